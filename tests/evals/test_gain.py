"""What is gained along a vector, against differences of plain transformers in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals.gain import POINTS, along, derivatives
from melbo_ray.evals.jacobian import matrix
from melbo_ray.evals.linear import aim
from melbo_ray.evals.runner import evaluate
from melbo_ray.search.subspace import beside
from tests.evals.reference import null_of, part_along, rows_of
from tests.families import D_MODEL, directions

STEP = 1e-2


def slope(study, point, theta):
    """The derivative of the part along a at `point` in direction θ, as a central difference."""
    ahead, behind = (part_along(study, point + sign * STEP * theta) for sign in (1, -1))
    return (ahead - behind) / (2 * STEP)


def test_the_gain_at_every_point_is_that_of_plain_transformers(study, chain):
    rows = evaluate("gain", study, chain)["gain"]
    assert rows.num_rows == 2 * 5 * (len(POINTS) + 1)
    for kind, theta in (("chain", chain.theta[1]), ("random", null_of(study, 2, chain.norms[1]))):
        points = {("own", at): theta * at for at in POINTS} | {("base", 1.0): study.base}
        for (point, at), here in points.items():
            (row,) = rows_of(rows, kind=kind, index=2, point=point, fraction=at)
            assert row["norm"] == pytest.approx(chain.norms[1], rel=1e-5)
            assert row["along"] == pytest.approx(part_along(study, here), abs=1e-4)
            assert row["gain"] == pytest.approx(slope(study, here, theta), abs=2e-3)


def test_the_sensitivity_is_the_gain_of_the_most_effective_direction(study, chain):
    (row,) = rows_of(evaluate("gain", study, chain)["gain"], kind="chain", index=1, point="base")
    (gradient,) = derivatives(study, study.base[None])[1]
    steepest = (gradient / gradient.norm()).float()
    assert row["sensitivity"] == pytest.approx(slope(study, study.base, steepest), rel=2e-3)


def test_of_what_a_chain_can_take_it_is_less(study, chain):
    """Without the part of the gradient in the span of the base and what the chain avoids, by float64 least squares."""
    avoided = beside(study.base, directions(3, seed=9))
    for own in ((), [*avoided]):
        narrower = dataclasses.replace(study, avoided=own)
        rows = rows_of(evaluate("gain", narrower, chain.take([0]))["gain"], kind="chain")
        at = torch.stack([chain.theta[0] * row["fraction"] for row in rows if row["point"] == "own"] + [study.base])
        taken = torch.stack([study.base, *own]).double().numpy().T
        for row, gradient in zip(rows, derivatives(study, at)[1].numpy(), strict=True):
            rest = gradient - taken @ np.linalg.lstsq(taken, gradient)[0]
            assert row["sensitivity_beside"] == pytest.approx(np.linalg.norm(rest), rel=1e-5)
            assert row["sensitivity"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


def test_no_chain_has_more_vectors_than_a_linear_map_about_the_base_allows():
    """With m = g·θ₀ − ½ and the rest of g along (1, 1, 1, 1) / 2, four axes beside the base have just as much."""
    base, needed = np.eye(6)[0] * 2, 0.3
    g = np.array([0.4, *[needed / 1.5] * 4, 0])
    assert g @ base - 0.5 == pytest.approx(needed)
    beside = np.linalg.norm(g - (g @ base) * base / (base @ base))
    assert (beside * 1.5 / needed) ** 2 == pytest.approx(4)
    assert sum(1 + g @ (axis * 1.5 - base) >= 0.5 - 1e-9 for axis in np.eye(6)[1:]) == 4


def test_at_0_it_is_the_first_order_of_the_jacobian(study, chain, whole):
    jacobian, towards = matrix(whole, "jacobian"), aim(study)
    rows = evaluate("gain", study, chain)["gain"]
    for row in rows_of(rows, kind="chain", point="own", fraction=0.0):
        theta = chain.theta[row["index"] - 1].double()
        assert row["gain"] == pytest.approx(float(jacobian @ theta @ towards / (towards @ towards)), abs=1e-4)
        assert row["sensitivity"] == pytest.approx(float((jacobian.T @ towards).norm() / (towards @ towards)), rel=1e-3)


def test_the_gains_along_a_short_vector_add_up_to_its_effect(study):
    """Boole's rule over the five points is the integral of the gain, of which the effect is the value at the end."""
    theta = study.base / 20
    at = torch.stack([theta * t for t in POINTS])
    reached, gradients = derivatives(study, at)
    total = (gradients @ theta.double()) @ torch.tensor([7, 32, 12, 32, 7], dtype=torch.float64) / 90
    assert float(total) == pytest.approx(float(reached[-1]), rel=1e-3)


def test_the_base_has_all_of_its_effect_and_no_vector_none(study):
    assert along(study, torch.stack([study.base, torch.zeros(D_MODEL)])).tolist() == pytest.approx([1, 0], abs=1e-5)
    assert derivatives(study, torch.zeros(1, D_MODEL))[1].isfinite().all()
