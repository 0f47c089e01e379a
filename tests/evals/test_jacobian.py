"""The Jacobian against differences of plain transformers, and what becomes of it where a block of rows fails."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals.catalog import BLOCKS
from melbo_ray.evals.context import Chain
from melbo_ray.evals.jacobian import batches, matrix
from melbo_ray.evals.runner import evaluate, evaluate_share
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
    blocks = [batches(wide, [item], 9) for item in range(BLOCKS)]
    assert torch.cat([torch.cat(some) for some in blocks if some]).tolist() == list(range(d_model))
    assert max(sum(map(len, some)) for some in blocks) == -(-d_model // BLOCKS)
    assert max(len(part) for some in blocks for part in some) <= 9


def test_without_a_row_what_needs_the_matrix_says_what_to_do(study, chain):
    lacking = evaluate("jacobian", study, chain)["jacobian"].slice(1)
    whole = Chain(study.base, chain, lambda table: lacking)
    (failure,) = evaluate_share("linear", "spectrum", [0], study, whole)["failures"].to_pylist()
    assert failure["error"] == (
        f"ValueError: jacobian has {D_MODEL - 1} of {D_MODEL} rows: see its failures, and evaluate it again"
    )
