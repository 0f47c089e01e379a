"""The evaluations: one module a question, each a pure function from a study and some vectors to rows of tables."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from melbo_ray.errors import first_line
from melbo_ray.evals import (
    composition,
    control,
    dose,
    generalization,
    generations,
    geometry,
    kl,
    presence,
    rescaled,
    shuffled,
)  # fmt: skip
from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.runs import schema

__all__ = ["EVALUATIONS", "Evaluation", "Study", "Vectors", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A question asked of vectors.

    Attributes:
        name: as in the option `evals`.
        tables: the tables it writes rows of.
        scope: `vector` (asked of any batch of vectors of any kind, as they appear) or `chain` (asked once, of all the
            vectors of kind `chain` together, at the end).
        run: the question.
    """

    name: str
    tables: tuple[str, ...]
    scope: Literal["vector", "chain"]
    run: Callable[[Study, Vectors], Rows]


EVALUATIONS = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation("kl", ("kl",), "vector", kl.run),
        Evaluation("greedy", ("generations",), "vector", generations.run_greedy),
        Evaluation("generations", ("generations",), "vector", generations.run),
        Evaluation("generalization", ("generalization",), "vector", generalization.run),
        Evaluation("dose", ("dose",), "vector", dose.run),
        Evaluation("presence", ("presence",), "vector", presence.run),
        Evaluation("control", ("kl", "generalization", "generations", "dose", "presence"), "chain", control.run),
        Evaluation("shuffled", ("vectors", "summary", "kl", "generalization"), "chain", shuffled.run),
        Evaluation("composition", ("composition",), "chain", composition.run),
        Evaluation("geometry", ("geometry", "summary"), "chain", geometry.run),
        Evaluation("rescaled", ("kl",), "chain", rescaled.run),
    )
}


def evaluate(name: str, study: Study, vectors: Vectors, failed: Mapping[int, int] | None = None) -> dict[str, pa.Table]:
    """One evaluation of some vectors, as tables: those it writes, and `failures`; each may be empty.

    What fails on one vector (a vector that is not finite, logits that are not, any error) becomes its row of
    `failures`, and the rest goes on. A chain-scoped evaluation that fails as a whole is filed under index 0 of its
    kind. `failed`: how often it has before, by index, which `attempts` counts too.

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
        rows = evaluation.run(study, vectors)
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
    failures[0 if evaluation.scope == "chain" else vectors.index[0]] = message
    return {}


def _check_finite(row: Row) -> None:
    for column, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{column} is {value}")
