import numpy as np
import pytest

from melbo_ray.evals.context import Vectors
from melbo_ray.evals.dose import ALPHAS
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import rows_of


def test_every_dose_is_that_of_plain_forward_passes(study, chain):
    table = evaluate("dose", study, chain.take([0, 3]))["dose"]
    for row in table.to_pylist():
        theta = chain.theta[row["index"] - 1]
        if row["norm"] is None:
            assert row["scale"] == "half"
            continue
        scaled = theta / theta.norm() * row["norm"]
        expected = reference.divergences(study, scaled)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-4)
        if row["scale"] != "half":
            assert row["concept_score"] == pytest.approx(reference.concept_score(study, scaled), abs=1e-4)


def test_doses_are_multiples_of_its_norm_and_steps_to_the_radius(study, chain):
    table = evaluate("dose", study, chain)["dose"]
    for index, norm in zip(chain.index, chain.norms, strict=True):
        doses = [row["norm"] for row in rows_of(table, index=index, scale="alpha")]
        assert doses == pytest.approx([alpha * norm for alpha in ALPHAS])
        steps = [row["norm"] for row in rows_of(table, index=index, scale="radius")]
        assert steps == pytest.approx(np.geomspace(norm, 5, 4)[1:])


def test_the_base_is_at_the_radius_already(study):
    assert not rows_of(evaluate("dose", study, Vectors("base", [0], study.base[None]))["dose"], scale="radius")


def test_the_knee_is_the_largest_second_difference(study, chain):
    table = evaluate("dose", study, chain)["dose"]
    for index in chain.index:
        curve = [0.0] + [row["kl_from_unsteered"] for row in rows_of(table, index=index, scale="alpha")]
        (knee,) = rows_of(table, index=index, scale="knee")
        place = int(np.argmax(np.diff(curve, 2)))
        assert knee["kl_from_unsteered"] == curve[place + 1]


def test_half_is_where_the_bases_own_curve_crosses_half_of_the_unsteered_kl(study):
    (half,) = rows_of(evaluate("dose", study, Vectors("base", [0], study.base[None]))["dose"], scale="half")
    goal = reference.divergences(study, 0 * study.base)["kl_from_base"] / 2
    # Bisected to 1/64 of a grid step.
    step = 0.25 * 5 / 64
    just_below, at = (
        reference.divergences(study, study.base / 5 * norm)["kl_from_base"]
        for norm in (half["norm"] - step, half["norm"])
    )
    assert at <= goal + 1e-5 < just_below + 2e-5


def test_a_direction_that_never_gets_there_has_no_half(study):
    away = Vectors("chain", [1], -study.base[None])
    (half,) = rows_of(evaluate("dose", study, away)["dose"], scale="half")
    assert half["norm"] is None
    assert half["kl_from_base"] is None
