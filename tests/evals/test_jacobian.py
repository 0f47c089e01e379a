"""The Jacobian against differences of plain transformers, and what becomes of it where a block of rows fails."""

import dataclasses

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from melbo_ray.evals.catalog import BLOCKS
from melbo_ray.evals.context import Chain
from melbo_ray.evals.jacobian import batches, matrix
from melbo_ray.evals.runner import evaluate, evaluate_share
from melbo_ray.runs import schema
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from tests.evals.reference import z_of
from tests.families import D_MODEL


def test_it_is_that_of_plain_transformers(study, whole):
    jacobian = matrix(whole, "jacobian")
    step = 1e-2  # norms run in float32, whose rounding is divided by it
    for axis in (0, 7, 31):
        unit = torch.zeros(D_MODEL, dtype=torch.float64)
        unit[axis] = step
        column = (z_of(study, unit) - z_of(study, -unit)) / (2 * step)
        assert jacobian[:, axis].numpy() == pytest.approx(column, abs=1e-3 * np.abs(column).max())


@pytest.mark.parametrize("d_model", [1, 32, 127, 128, 896, 5000])
def test_every_dimension_is_in_one_block(study, d_model):
    wide = dataclasses.replace(study, base=torch.zeros(d_model))
    single = [[found for _, found in batches(wide, [item], 9)] for item in range(BLOCKS)]
    assert torch.cat([torch.cat(some) for some in single if some]).tolist() == list(range(d_model))
    assert max(sum(map(len, some)) for some in single) == -(-d_model // BLOCKS)
    assert max(len(part) for some in single for part in some) <= 9
    together = [
        (block, int(i))
        for blocks, found in batches(wide, range(BLOCKS), 9)
        for block, i in zip(blocks, found, strict=True)
    ]
    assert together == [(block, int(i)) for block, some in enumerate(single) for part in some for i in part]


def test_without_a_row_what_needs_the_matrix_says_what_to_do(study, chain):
    lacking = evaluate("jacobian", study, chain)["jacobian"].slice(1)
    whole = Chain(study.base, chain, lambda table: lacking)
    (failure,) = evaluate_share("linear", "spectrum", [0], study, whole)["failures"].to_pylist()
    assert failure["error"] == (
        f"ValueError: jacobian has {D_MODEL - 1} of {D_MODEL} rows: see its failures, and evaluate it again"
    )


@pytest.mark.parametrize("published", [True, False])
def test_a_block_that_failed_and_is_found_again_has_its_rows_once(study, whole, tmp_path, published):
    """An evaluator that lingers writes the same unit whole, and so does the one that tries again."""
    run, unit, state = (
        Run.open(str(tmp_path)),
        Unit("code", "jacobian", "block", 0, BLOCKS - 1),
        Manifest(run_id="run", status="running"),
    )
    rows = evaluate_share("jacobian", "block", range(BLOCKS), study, whole)
    failed = study.row("block", 3, evaluation="jacobian", error="x", attempts=1)
    without = rows["jacobian"].filter(pc.field("index") != 3)
    run.commit(unit, {"jacobian": without, "failures": schema.table("failures", [failed])})
    if published:
        run.publish(state, lambda: None)
    for _ in range(2):
        run.commit(unit, rows)
        if published:
            run.publish(state, lambda: None)
    stored = Chain(whole.base, whole.every, lambda table: run.read(table, "code"))
    assert torch.equal(matrix(stored, "jacobian"), matrix(whole, "jacobian"))
    assert run.read("failures", "code").num_rows == 0
