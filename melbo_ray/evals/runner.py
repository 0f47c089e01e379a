"""The evaluations: one module a question, each a pure function from a study and some vectors to rows of tables."""

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
"""Every evaluation by its name: `run` of the module that has it."""


def evaluate(name: str, study: Study, vectors: Vectors, failed: Mapping[int, int] | None = None) -> dict[str, pa.Table]:
    """One evaluation of some vectors, as tables: those it writes, and `failures`; each may be empty.

    What fails on one vector (a vector that is not finite, logits that are not, any error) becomes its row of
    `failures`, and the rest goes on. One of a whole chain that fails is filed under index 0
    of its kind. `failed`: how often it has before, by index, which `attempts` counts too.

    Raises:
        torch.AcceleratorError: the GPU is of no use to this process any more; another one shall try.
        torch.OutOfMemoryError: it has no room for a single vector now; as much.
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
    """Rows of those vectors for which it works; the others go into `failures`."""
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
    if several:  # out of the handler: its error keeps the tensors of the whole batch
        parts = [_attempt(evaluation, study, vectors.take([i]), failures) for i in range(len(vectors))]
        return {table: [row for part in parts for row in part.get(table, [])] for table in evaluation.tables}
    failures[0 if evaluation.scope == WHOLE else vectors.index[0]] = message
    return {}


def _check_finite(row: Row) -> None:
    for column, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{column} is {value}")
