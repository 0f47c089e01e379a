"""What is gained along a vector, against differences of plain transformers in float64."""

import pytest
import torch

from melbo_ray.evals.gain import POINTS, along, derivatives
from melbo_ray.evals.jacobian import matrix
from melbo_ray.evals.linear import aim
from melbo_ray.evals.runner import evaluate
from tests.evals.reference import null_of, part_along, rows_of
from tests.families import D_MODEL

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
