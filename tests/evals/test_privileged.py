"""Exponents of mixtures, of known contours and maps, and against plain transformers."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import efficiency, privileged
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import rows_of, streams
from tests.families import D_MODEL

ZERO = torch.zeros(D_MODEL)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_the_exponent_of_a_known_contour_is_found(p):
    angles = np.deg2rad([0, 22.5, 45, 67.5, 90])
    norms = ((np.cos(angles) / 3) ** p + (np.sin(angles) / 5) ** p) ** (-1 / p)
    assert privileged.exponent(dict(zip((0, 22.5, 45, 67.5, 90), norms, strict=True))) == pytest.approx(p, abs=0.01)


def test_of_a_linear_map_two_orthogonal_effects_have_exponent_2_and_one_effect_1(study, monkeypatch):
    axes = torch.eye(D_MODEL)
    same = torch.zeros(D_MODEL, D_MODEL)
    same[0, :2] = 1
    for matrix, p in ((axes, 2), (same, 1)):
        monkeypatch.setattr(privileged, "moved", lambda _, thetas, m=matrix: (thetas @ m.T).norm(dim=-1))
        fresh = dataclasses.replace(study)
        fits = privileged.fits_of(fresh, axes[0], {"one": axes[1], "other": axes[1]})
        assert [fit["p"] for fit in fits.values()] == pytest.approx([p, p], abs=0.02)


def test_the_norms_of_mixtures_have_half_of_the_bases_effect(study, chain):
    rows = evaluate("privileged", study, chain)["privileged"]
    tokens, layer = reference.prompt_tokens(study), study.config.target_layer
    z = lambda theta: streams(study, tokens, theta)[layer][1:].mean(0)  # noqa: E731
    moved = lambda theta: z(theta) - z(ZERO)  # noqa: E731
    goal = np.linalg.norm(moved(study.base)) / 2
    for row in rows_of(rows, kind="chain", partner="base"):
        assert (row["p"] is None) == (row["left_out"] is not None)
        unit = chain.theta[row["index"] - 1] / chain.norms[row["index"] - 1]
        if row["norm_pure"] is not None:
            assert np.linalg.norm(moved(unit * row["norm_pure"])) == pytest.approx(goal, rel=0.1)
    assert {row["partner"] for row in rows.to_pylist()} == {"base", "random", "component"}
    assert len(rows) == 2 * 3 * 5


def test_the_components_are_those_of_the_covariance_of_what_the_model_reads_and_writes(study):
    units = efficiency.natural(study).double().numpy()
    assert np.linalg.norm(units, axis=1) == pytest.approx(np.ones(len(units)), abs=1e-5)
    vectors = np.linalg.eigh(np.cov(units.T))[1]
    found = privileged.components(study).numpy()
    assert np.abs((found * vectors.T[::-1][:3]).sum(1)) == pytest.approx(np.ones(3), abs=1e-3)


def test_beside_the_base_stand_directions_that_the_model_is_known_to_use(study):
    base = Vectors("base", [0], study.base[None])
    with_contrast = study.concept.model_copy(update={"contrast": ["Write code.", "Write a function."]})
    told = evaluate("privileged", dataclasses.replace(study, concept=with_contrast), base)["privileged"].to_pylist()
    assert [(row["kind"], row["index"], row["partner"]) for row in told] == [
        ("base", 0, "random"),
        ("base", 0, "component"),
        ("base", 0, "contrast"),
        ("contrast", 0, "random"),
        ("component", 1, "random"),
        ("component", 2, "random"),
        ("component", 3, "random"),
    ]


def test_the_mean_difference_of_a_concept_without_contrast_prompts_is_left_out_with_the_reason(study, chain):
    rows = evaluate("privileged", study, Vectors("base", [0], study.base[None]))["privileged"].to_pylist()
    assert {row["kind"] for row in rows} == {"base", "component"}
    (row,) = [row for row in rows if row["partner"] == "contrast"]
    assert (row["p"], row["left_out"]) == (None, "the concept has no contrast prompts")
    assert "contrast" not in {row["partner"] for row in evaluate("privileged", study, chain)["privileged"].to_pylist()}


def test_where_no_norm_suffices_it_is_left_out_with_the_reason(study, chain, monkeypatch):
    monkeypatch.setattr(privileged, "_goal", lambda _: 1e9)
    rows = evaluate("privileged", dataclasses.replace(study), chain)["privileged"].to_pylist()
    assert {row["p"] for row in rows} == {None}
    assert {row["left_out"] for row in rows} == {"no norm up to 8 R has half of the base's effect"}
