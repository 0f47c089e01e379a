"""Running evaluations, which are pure functions from a study and vectors to rows of tables; recording failures."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import torch

from melbo_ray.errors import first_line
from melbo_ray.evals.catalog import EVALUATIONS, Evaluation
from melbo_ray.evals.context import Chain, Row, Rows, Study, Vectors
from melbo_ray.runs import schema
from melbo_ray.runs.work_unit import WHOLE

_NOT_FINITE = "the vector is not finite"

FUNCTIONS: dict[str, Callable[..., Rows]] = {
    name: importlib.import_module(f"melbo_ray.evals.{name}").run for name in EVALUATIONS
}
"""The function `run` of every evaluation: of (study, vectors), or for scope `whole` of (study, chain, share, items)."""


def evaluate(name: str, study: Study, vectors: Vectors, failed: Mapping[int, int] | None = None) -> dict[str, pa.Table]:
    """Run one evaluation on vectors; returns its tables and `failures`, any of which may be empty.

    An error on one vector (a vector or logits that are not finite, or any exception) becomes a row of `failures`, and
    the other vectors are still evaluated. An evaluation of scope `whole` takes the vectors as the whole chain and runs
    all of its shares, as `evaluate_share`; what they need of other evaluations is computed.

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
    if evaluation.scope == WHOLE:
        chain = Chain(study.base, vectors, lambda table: _needed(table, study, vectors), study.avoided)
        items = {share.name: share.items(chain.length) for share in evaluation.shares if len(vectors)}
        parts = [evaluate_share(name, share, of, study, chain, failed) for share, of in items.items()]
        empty = _written(evaluation, study, vectors.kind, {}, {}, {})
        return {table: pa.concat_tables([rows, *(part[table] for part in parts)]) for table, rows in empty.items()}
    finite = torch.isfinite(vectors.theta).all(-1).tolist()
    failures = {index: _NOT_FINITE for index, good in zip(vectors.index, finite, strict=True) if not good}
    good = [index for index in vectors.index if index not in failures]
    rows = _attempt(evaluation, lambda some: FUNCTIONS[name](study, vectors.at(some)), good, failures)
    return _written(evaluation, study, vectors.kind, rows, failures, failed or {})


def _needed(table: str, study: Study, vectors: Vectors) -> pa.Table:
    """What a run would hold of a table: the rows of the evaluation of its name."""
    return evaluate(table, study, vectors)[table] if table in EVALUATIONS else schema.table(table, [])


def evaluate_share(
    name: str, share: str, items: Sequence[int], study: Study, chain: Chain, failed: Mapping[int, int] | None = None
) -> dict[str, pa.Table]:
    """Run items of a share of an evaluation of scope `whole`; otherwise as `evaluate`.

    An error on one item becomes a row of `failures`, whose kind is the share and whose index the item.
    """
    evaluation, failures = EVALUATIONS[name], {}
    if evaluation.share(share).of_vectors:
        failures = {item: _NOT_FINITE for item in items if item in chain.broken}
    good = [item for item in items if item not in failures]
    rows = _attempt(evaluation, lambda some: FUNCTIONS[name](study, chain, share, some), good, failures)
    return _written(evaluation, study, share, rows, failures, failed or {})


def _written(
    evaluation: Evaluation, study: Study, kind: str, rows: Rows, failures: Mapping[int, str], failed: Mapping[int, int]
) -> dict[str, pa.Table]:
    written = {table: schema.table(table, rows.get(table, [])) for table in evaluation.tables}
    filed = [
        study.row(kind, index, evaluation=evaluation.name, error=error, attempts=1 + failed.get(index, 0))
        for index, error in failures.items()
    ]
    return {**written, "failures": schema.table("failures", filed)}


def _attempt(
    evaluation: Evaluation, run: Callable[[Sequence[int]], Rows], items: Sequence[int], failures: dict[int, str]
) -> Rows:
    """The rows of the items (indices of vectors) that succeed; errors of the others are added to `failures`."""
    if not len(items):
        return {}
    several = len(items) > 1
    try:
        rows = run(items)
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
        parts = [_attempt(evaluation, run, [item], failures) for item in items]
        return {table: [row for part in parts for row in part.get(table, [])] for table in evaluation.tables}
    failures[items[0]] = message
    return {}


def _check_finite(row: Row) -> None:
    for column, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{column} is {value}")
