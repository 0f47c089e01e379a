"""Running evaluations, which are pure functions from a study and vectors to rows of tables; recording failures."""

import importlib
import math
from collections.abc import Callable, Mapping

import pyarrow as pa
import torch

from melbo_ray.errors import first_line
from melbo_ray.evals.catalog import EVALUATIONS, Evaluation
from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.runs import schema
from melbo_ray.runs.work_unit import WHOLE

FUNCTIONS: dict[str, Callable[[Study, Vectors], Rows]] = {
    name: importlib.import_module(f"melbo_ray.evals.{name}").run for name in EVALUATIONS
}
"""The function `run` of every evaluation, by name."""


def evaluate(name: str, study: Study, vectors: Vectors, failed: Mapping[int, int] | None = None) -> dict[str, pa.Table]:
    """Run one evaluation on vectors; returns its tables and `failures`, any of which may be empty.

    An error on one vector (a vector or logits that are not finite, or any exception) becomes a row of `failures`, and
    the other vectors are still evaluated. A failure on the whole chain has index 0.

    Args:
        name: name of the evaluation.
        study: the context.
        vectors: the vectors.
        failed: number of earlier failures by index, to which `attempts` adds one.

    Raises:
        torch.AcceleratorError: the GPU is unusable for this process; another worker should retry.
        torch.OutOfMemoryError: the GPU has no memory for a single vector; another worker should retry.
    """
    evaluation = EVALUATIONS[name]
    finite = torch.isfinite(vectors.theta).all(-1).tolist()
    failures = {
        index: "the vector is not finite" for index, good in zip(vectors.index, finite, strict=True) if not good
    }
    rows = _attempt(evaluation, study, vectors.take([i for i, good in enumerate(finite) if good]), failures)
    written = {table: schema.table(table, rows.get(table, [])) for table in evaluation.tables}
    filed = [
        study.row(vectors.kind, index, evaluation=name, error=error, attempts=1 + (failed or {}).get(index, 0))
        for index, error in failures.items()
    ]
    return {**written, "failures": schema.table("failures", filed)}


def _attempt(evaluation: Evaluation, study: Study, vectors: Vectors, failures: dict[int, str]) -> Rows:
    """The rows of the vectors that succeed; errors of the others are added to `failures`."""
    if not len(vectors):
        return {}
    several = evaluation.scope == "vector" and len(vectors) > 1
    try:
        rows = FUNCTIONS[evaluation.name](study, vectors)
        for row in (row for part in rows.values() for row in part):
            _check_finite(row)
        return rows
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and not several:
            raise
        message = f"{type(error).__name__}: {first_line(error)}"
    if several:  # outside the handler, whose exception keeps the tensors of the whole batch alive
        parts = [_attempt(evaluation, study, vectors.take([i]), failures) for i in range(len(vectors))]
        return {table: [row for part in parts for row in part.get(table, [])] for table in evaluation.tables}
    failures[0 if evaluation.scope == WHOLE else vectors.index[0]] = message
    return {}


def _check_finite(row: Row) -> None:
    for column, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{column} is {value}")
