"""The quadratic form against plain transformers, and its bound against families that reach it."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import curvature
from melbo_ray.evals.context import Chain
from melbo_ray.evals.jacobian import matrix
from melbo_ray.evals.runner import evaluate, evaluate_share
from melbo_ray.runs import schema
from melbo_ray.search.subspace import beside
from tests.evals import reference
from tests.evals.reference import null_of, part_along, relative_loss, rows_of
from tests.families import D_MODEL, directions, tiny


@pytest.fixture(scope="module")
def form(study, whole):
    return curvature.form_of(study, matrix(whole, "hessian"))


def with_eigenvalues(values):
    """A form that has these eigenvalues along the axes beside the base, and no gradient."""
    eigenvalues = torch.tensor([0.0, *values], dtype=torch.float64)
    axes = torch.eye(D_MODEL, dtype=torch.float64)
    return curvature.Form(torch.diag(eigenvalues), torch.zeros(D_MODEL).double(), eigenvalues[1:], axes[1:])


def test_the_form_beside_the_base_is_diagonal_in_its_eigenvectors(study, form):
    hessian, _, values, vectors = form
    assert torch.equal(hessian, hessian.T)
    hessian = hessian.numpy()
    b = study.base.double().numpy() / study.radius
    project = np.eye(D_MODEL) - np.outer(b, b)
    expected = np.sort(np.linalg.eigvalsh(project @ hessian @ project))
    beside_base = np.delete(expected, np.abs(expected).argmin())
    assert values.numpy() == pytest.approx(beside_base[::-1], abs=1e-6)
    assert (vectors @ vectors.T).numpy() == pytest.approx(np.eye(D_MODEL - 1), abs=1e-8)
    assert (vectors.numpy() @ b) == pytest.approx(np.zeros(D_MODEL - 1), abs=1e-6)
    assert np.einsum("ki,ij,kj->k", vectors.numpy(), hessian, vectors.numpy()) == pytest.approx(
        values.numpy(), abs=1e-6
    )


def test_rows_are_what_the_form_and_the_model_have_of_each_vector(study, chain, form):
    written = evaluate("curvature", study, chain)
    rows, (hessian, gradient, values, vectors) = written["curvature"], form
    hessian = hessian.numpy()
    quadratic = [vectors[n - 1] * chain.norms[n - 1] for n in chain.index]
    quadratic = [(theta if theta @ gradient >= 0 else -theta).float() for theta in quadratic]
    kinds = {"chain": chain.theta[1], "random": null_of(study, 2, chain.norms[1]), "quadratic": quadratic[1]}
    for kind, theta in kinds.items():
        assert {row["index"] for row in rows_of(rows, kind=kind)} == set(chain.index)
        (row,) = rows_of(rows, kind=kind, index=2)
        x = theta.double().numpy()
        on = vectors[values > 0].numpy() @ x
        expected = {
            "norm": chain.norms[1],
            "along": part_along(study, theta),
            "first_order": gradient.numpy() @ x,
            "second_order": x @ hessian @ x / 2,
            "positive": on @ on / (x @ x),
            "relative_loss": relative_loss(study, theta),
            "kl_from_base": reference.divergences(study, theta)["kl_from_base"],
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-3, rel=1e-3), kind
    figures = {row["figure"]: row["value"] for row in written["summary"].to_pylist()}
    assert figures["hessian_largest"] == pytest.approx(float(values.max()))
    assert figures["hessian_smallest"] == pytest.approx(float(values.min()))
    assert figures["hessian_positive"] == (values > 0).sum()
    assert figures["hessian_enough"] == (values * np.median(chain.norms) ** 2 >= 1).sum()


def test_a_short_vector_has_the_effect_that_the_form_foretells(study, form):
    for theta in (study.base / 50, -study.base / 50):
        short = theta.double()
        foretold = float(form.gradient @ short + short @ form.hessian @ short / 2)
        assert foretold == pytest.approx(part_along(study, theta), rel=2e-2)


def test_of_a_form_with_positive_eigenvalues_only_in_a_plane_the_quadratic_chain_has_two(chain):
    short = with_eigenvalues([2.0, 1.0] + [-1.0] * (D_MODEL - 3))
    found = curvature.quadratic_chain(short, chain)
    assert found.index == [1, 2]
    assert found.theta[:, 1:3].abs().numpy() == pytest.approx(np.diag(chain.norms[:2]), abs=1e-5)


def test_no_orthogonal_family_has_more_than_the_bound_and_one_reaches_it(study):
    """A constant diagonal exists of every symmetric matrix (Horn 1954): k vectors share the k largest eigenvalues."""
    values = torch.tensor([3.0, 1.0, 0.5, 0.3, -1.0, -2.0]).double()
    none = torch.zeros(6, dtype=torch.float64)
    # The means of the k largest are 3, 2, 1.5, 1.2, 0.76, …: of norm 1, half of them must be at least a half.
    assert curvature.most(none, values, 1.0, 0.5) == 4
    corners = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    reached = [corner @ np.diag(values[:4]) @ corner / 2 for corner in corners]
    assert reached == pytest.approx([0.6] * 4)
    draws = np.random.default_rng(0)
    for _ in range(50):
        family = np.linalg.qr(draws.normal(size=(6, 6)))[0]
        assert sum(row @ np.diag(values) @ row / 2 >= 0.5 for row in family) <= 4


def test_without_curvature_the_bound_is_that_of_a_linear_map():
    gradient = torch.tensor([1.5, 0, 0, 0, 0, 0, 0, 0, 0, 0]).double()
    assert curvature.most(gradient, torch.zeros(10).double(), 1.0, 0.5) == 9  # (1.5 / 0.5)²


def test_gradient_and_curvature_together_reach_the_bound_that_neither_reaches_alone():
    """G = c (1, 1, 1, 1) / 2 and λ = 1 − c along four axes: each has c / 2 + λ / 2 = ½, and the bound is met."""
    slope, values = 0.4, torch.tensor([0.6, 0.6, 0.6, 0.6, 0, 0, -1, -1]).double()
    gradient = torch.tensor([slope / 2] * 4 + [0] * 4).double()
    reached = gradient + values / 2
    assert reached[:4].numpy() == pytest.approx([0.5] * 4)
    none = torch.zeros(8).double()
    for length, of_both in ((1.0 - 1e-3, 3), (1.0 + 1e-3, 4)):
        assert curvature.most(gradient, values, length, 0.5) == of_both
        assert curvature.most(gradient, none, length, 0.5) == curvature.most(none, values, length, 0.5) == 0
    draws = np.random.default_rng(0)
    for _ in range(200):
        family = np.linalg.qr(draws.normal(size=(8, 8)))[0]
        effects = np.abs(family @ gradient.numpy()) + ((family * values.numpy()) * family).sum(1) / 2
        assert (effects >= 0.5).sum() <= curvature.most(gradient, values, 1 + 1e-3, 0.5)


def test_the_forms_parts_along_the_base_and_what_the_chain_avoids_do_not_count(study, whole):
    avoided = beside(study.base, directions(3, seed=9))
    narrower = dataclasses.replace(study, avoided=[*avoided])
    hessian = matrix(whole, "hessian")
    form = curvature.form_of(narrower, hessian)
    free = np.linalg.svd(torch.stack([study.base, *avoided]).double().numpy())[2][4:]
    expected = np.linalg.eigvalsh(free @ ((hessian + hessian.T) / 2).numpy() @ free.T)[::-1]
    assert form.values.numpy() == pytest.approx(expected, abs=1e-8)
    assert (form.vectors.float() @ avoided.T).abs().max() < 1e-5
    norm = max(whole.vectors.norms)
    allowed = [
        np.sqrt(k) * np.linalg.norm(free @ form.gradient.numpy()) * norm
        + expected[:k].clip(min=0).sum() * norm**2 / 2
        - k / 2
        for k in range(1, 1 + len(expected))
    ]
    found = curvature.spectrum(narrower, form, whole.vectors)["most_below_half"]
    assert found == sum(value >= 0 for value in allowed)


@pytest.mark.parametrize("family", ["gemma4-shared", "gpt2", "bloom"])
def test_other_families_are_measured_too(study, chain, family):
    other = dataclasses.replace(study, model=tiny(family))
    for name in ("gain", "curvature"):
        assert evaluate(name, other, chain.take([0]))["failures"].to_pylist() == []


def test_a_form_without_a_positive_eigenvalue_has_no_quadratic_chain(study, chain):
    assert len(curvature.quadratic_chain(with_eigenvalues([-1.0] * (D_MODEL - 1)), chain)) == 0
    rows = [
        study.row("block", axis, dimension=axis, row=(-torch.eye(D_MODEL)[axis]).tolist()) for axis in range(D_MODEL)
    ]
    whole = Chain(study.base, chain, lambda table: schema.table(table, rows))
    written = evaluate_share("curvature", "chain", chain.index, study, whole)
    assert written["failures"].num_rows == 0
    assert {*written["curvature"]["kind"].to_pylist()} == {"chain", "random"}
