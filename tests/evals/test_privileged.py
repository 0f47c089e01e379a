"""Exponents of mixtures, of known contours and maps, and against plain transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from melbo_ray.evals import efficiency, privileged
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import rows_of, streams
from tests.families import D_MODEL

ZERO = torch.zeros(D_MODEL)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_the_exponent_of_a_known_contour_is_found(p):
    mixed = ((np.cos(np.pi / 4) / 3) ** p + (np.sin(np.pi / 4) / 5) ** p) ** (-1 / p)
    assert privileged.exponent(3, 5, mixed) == pytest.approx(p, abs=0.01)


def fit_of(study, monkeypatch, displacement):
    """The columns of two axes whose displacement is this function of their coefficients x and y."""

    def moved(_, thetas):
        return torch.stack([torch.as_tensor(displacement(*map(float, theta[:2]))).norm() for theta in thetas])

    monkeypatch.setattr(privileged, "moved", moved)
    axes = torch.eye(D_MODEL)
    study = dataclasses.replace(study, base=axes[0] * study.radius)
    fits = privileged.fits_of(study, axes[0], {"one": axes[1], "other": axes[1]})
    assert fits["one"] == fits["other"]
    return fits["one"]


@pytest.mark.parametrize("cos", [-0.9, -0.3, 0.0, 1.0])
def test_of_a_linear_map_the_exponent_is_2_whatever_the_angle_of_the_effects(study, monkeypatch, cos):
    sin = (1 - cos**2) ** 0.5
    fit = fit_of(study, monkeypatch, lambda x, y: [x + 2 * y * cos, 2 * y * sin])
    assert (fit["p"], fit["p_orthogonal"]) == pytest.approx((2, 2), abs=0.02)


def test_orthogonal_effects_that_grow_as_the_square_have_the_exponent_of_the_null(study, monkeypatch):
    fit = fit_of(study, monkeypatch, lambda x, y: [x * abs(x), y * abs(y)])
    assert (fit["p"], fit["p_orthogonal"]) == pytest.approx((4, 4), abs=0.02)


def test_an_effect_that_the_other_one_suppresses_is_above_the_null(study, monkeypatch):
    fit = fit_of(study, monkeypatch, lambda x, y: [x * np.exp(-abs(y) / 20), y * np.exp(-abs(x) / 20)])
    assert fit["p_orthogonal"] == pytest.approx(2, abs=0.02)
    assert fit["p"] > 2.2


def crossing(norms, effects):
    """The norm at which the effect is 1, log-linear between the norms."""
    return np.exp(np.interp(0, np.log(effects), np.log(norms)))


def root(a, b, mixed):
    """The p with (x/a)ᵖ + (x/b)ᵖ = 1 for x = mixed / √2."""
    x = mixed / np.sqrt(2)
    return brentq(lambda p: (x / a) ** p + (x / b) ** p - 1, 0.5, 8)


def test_the_figures_of_a_mixture_are_those_of_plain_transformers(study, chain):
    rows = evaluate("privileged", study, chain)["privileged"]
    theta, tokens, layer = chain.theta[0], reference.prompt_tokens(study), study.config.target_layer
    z = lambda theta: streams(study, tokens, theta)[layer][1:].mean(0)  # noqa: E731
    goal = np.linalg.norm(z(study.base) - z(ZERO)) / 2
    unit, other = theta / theta.norm(), study.base / study.base.norm()
    norms = study.radius * np.sqrt(2.0) ** np.arange(-4, 7)
    effect = lambda way: np.array([np.linalg.norm(z(way * float(r)) - z(ZERO)) / goal for r in norms])  # noqa: E731
    pure, alone, plus, minus = (effect(way / way.norm()) for way in (unit, other, unit + other, unit - other))
    expected = {
        "norm_pure": crossing(norms, pure),
        "norm_partner": crossing(norms, alone),
        "norm_mixed": crossing(norms, np.sqrt((plus**2 + minus**2) / 2)),
    }
    expected["p"] = root(*expected.values())
    without = crossing(norms[1:], np.sqrt(pure[:-1] ** 2 + alone[:-1] ** 2))
    expected["p_orthogonal"] = root(expected["norm_pure"], expected["norm_partner"], without)
    (row,) = rows_of(rows, kind="chain", index=1, partner="base")
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-2)
    found = [(row["kind"], row["partner"]) for row in rows.to_pylist()]
    partners = {"chain": ("random", "base", "component"), "random": ("random",)}
    assert sorted(found) == sorted((kind, name) for kind, names in partners.items() for name in names * 5)


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
