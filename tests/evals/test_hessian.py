"""The Hessian against second differences of plain transformers."""

import pytest
import torch

from melbo_ray.evals.jacobian import matrix
from tests.evals.reference import part_along
from tests.families import D_MODEL

STEP = 0.1


def second_difference(study, one, other):
    """oneᵀ H other for the part along a at 0, by differences of plain transformers in float64."""
    at = {(i, j): part_along(study, STEP * (i * one + j * other)) for i in (1, -1) for j in (1, -1)}
    return (at[1, 1] - at[1, -1] - at[-1, 1] + at[-1, -1]) / (4 * STEP**2)


def test_it_is_that_of_plain_transformers(study, whole):
    hessian = matrix(whole, "hessian")
    largest = float(hessian.abs().max())
    for i, j in ((0, 0), (3, 3), (2, 9), (31, 5)):
        one, other = (torch.eye(D_MODEL, dtype=torch.float64)[axis] for axis in (i, j))
        assert float(hessian[i, j]) == pytest.approx(second_difference(study, one, other), abs=0.02 * largest)
    assert float((hessian - hessian.T).abs().max()) < 1e-5 * largest
