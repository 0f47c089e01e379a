"""The linear null chain against dense float64 algebra."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from melbo_ray.evals import linear
from melbo_ray.evals.context import Chain
from melbo_ray.evals.jacobian import matrix
from melbo_ray.evals.linear import Map, best_at_norms, spectrum
from melbo_ray.evals.linear import aim as aim_of
from melbo_ray.evals.runner import evaluate
from melbo_ray.search.subspace import beside
from tests.evals import reference
from tests.evals.reference import null_of, relative_loss, rows_of, z_of
from tests.families import D_MODEL, directions


def dense(jacobian, aim, taken, norm):
    """Minimise ‖Jx − a‖ / ‖a‖ for ‖x‖ ≤ norm in the complement, by an SVD and a root of the secular equation."""
    complement = np.linalg.svd(np.atleast_2d(taken))[2][len(taken) :].T
    u, s, vh = np.linalg.svd(jacobian @ complement)
    c = u.T @ aim
    size = lambda mu: np.linalg.norm(s * c[: len(s)] / (s**2 + mu)) - norm  # noqa: E731
    mu = brentq(size, 0, 1e9, xtol=1e-14, rtol=1e-14) if size(0) > 0 else 0.0
    x = complement @ vh.T @ (s * c[: len(s)] / (s**2 + mu))
    return x, np.linalg.norm(jacobian @ x - aim) / np.linalg.norm(aim)


@pytest.mark.parametrize("taken", [1, 3, 20, 31])
@pytest.mark.parametrize("norm", [0.1, 2.0])
def test_the_best_at_a_norm_is_that_of_dense_algebra(taken, norm):
    draws = np.random.default_rng(3)
    jacobian = draws.normal(size=(D_MODEL, D_MODEL)) * np.linspace(3, 0.1, D_MODEL)
    aim, basis = draws.normal(size=D_MODEL), np.linalg.qr(draws.normal(size=(D_MODEL, taken)))[0].T
    ((x, loss),) = best_at_norms(Map(*map(torch.from_numpy, (jacobian, aim))), torch.from_numpy(basis), [norm])
    expected, least = dense(jacobian, aim, basis, norm)
    assert loss == pytest.approx(least, abs=1e-6)
    assert x.numpy() == pytest.approx(expected, abs=1e-4)
    assert np.abs(basis @ x.numpy()).max() < 1e-8


def test_on_a_wide_matrix_with_a_long_tail_the_krylov_space_is_large_enough():
    draws = np.random.default_rng(4)
    size = 400
    left, right = (np.linalg.qr(draws.normal(size=(size, size)))[0] for _ in range(2))
    jacobian = left * np.geomspace(3.5, 0.05, size) @ right
    aim, basis = draws.normal(size=size) * 4 / np.sqrt(size), np.eye(size)[:100]
    for norm in (1.0, 3.0, 9.0):
        ((_, loss),) = best_at_norms(Map(*map(torch.from_numpy, (jacobian, aim))), torch.from_numpy(basis), [norm])
        assert loss == pytest.approx(dense(jacobian, aim, basis, norm)[1], abs=1e-3)


def test_predicted_stands_beside_found(study, chain, whole):
    written = evaluate("linear", study, chain)
    unsteered, base = z_of(study, torch.zeros(D_MODEL)), z_of(study, study.base)
    jacobian, aim = matrix(whole, "jacobian").numpy(), base - unsteered
    for row in rows_of(written["linear"], kind="chain"):
        n = row["index"]
        theta = chain.theta[n - 1].double()
        taken = np.concatenate([study.base.numpy()[None], chain.theta[: n - 1].numpy()]).astype(float)
        x, loss = dense(jacobian, aim, taken, chain.norms[n - 1])
        expected = {
            "norm": chain.norms[n - 1],
            "linear_loss": loss,
            "linear_loss_at_radius": dense(jacobian, aim, taken, study.radius)[1],
            "found_linear_loss": np.linalg.norm(jacobian @ theta.numpy() - aim) / np.linalg.norm(aim),
            "cos": theta.numpy() @ x / np.linalg.norm(theta) / np.linalg.norm(x),
            "relative_loss": relative_loss(study, theta),
            "first_order": (jacobian @ theta.numpy()) @ aim / (aim @ aim),
            "mirrored_share": (z_of(study, -theta) - unsteered) @ aim / ((z_of(study, theta) - unsteered) @ aim),
            "half_share": (z_of(study, theta / 2) - unsteered) @ aim / ((z_of(study, theta) - unsteered) @ aim),
            "solution_loss": relative_loss(study, torch.from_numpy(x)),
            "kl_from_base": reference.divergences(study, torch.from_numpy(x).float())["kl_from_base"],
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-3, rel=1e-3)
    sigma = np.linalg.svd(jacobian)[1]
    p = sigma / sigma.sum()
    figures = {row["figure"]: row["value"] for row in written["summary"].to_pylist()}
    assert figures["jacobian_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert figures["jacobian_largest"] == pytest.approx(sigma[0], rel=1e-6)


def test_the_nulls_are_the_best_beside_random_directions_and_beside_the_linear_chains_own(study, chain, whole):
    rows, radius = evaluate("linear", study, chain)["linear"], study.radius
    jacobian, aim = matrix(whole, "jacobian").numpy(), z_of(study, study.base) - z_of(study, torch.zeros(D_MODEL))
    base = study.base.double().numpy()
    own = [base]
    for n, norm in zip(chain.index, chain.norms, strict=True):
        before = {"linear": own, "random": [base, *(null_of(study, i, 1.0).numpy() for i in range(1, n))]}
        for kind, taken in before.items():
            (row,) = rows_of(rows, kind=kind, index=n)
            losses = [dense(jacobian, aim, np.stack(taken), at)[1] for at in (norm, radius)]
            names = ("linear_loss", "linear_loss_at_radius")
            assert [row[name] for name in names] == pytest.approx(losses, abs=1e-5)
            assert {row[name] for name in ("relative_loss", "found_linear_loss", "first_order", "cos")} == {None}
        own = [*own, dense(jacobian, aim, np.stack(own), norm)[0]]


def test_what_the_chain_avoids_is_taken_before_every_vector_and_counts_in_no_bound(study, chain, whole):
    avoided = beside(study.base, directions(3, seed=9))
    narrower, jacobian = dataclasses.replace(study, avoided=[*avoided]), matrix(whole, "jacobian").numpy()
    first = Map(torch.from_numpy(jacobian), aim_of(study))
    taken = torch.stack([study.base, *avoided]).double().numpy()
    for kind in ("chain", "random", "linear"):
        rows = linear.taken_before(narrower, first, chain, kind).numpy()
        assert rows @ rows.T == pytest.approx(np.eye(len(rows)), abs=1e-8)
        (row,) = linear.rows_beside(narrower, first, chain, [0], kind, torch.from_numpy(rows))
        assert row["linear_loss"] == pytest.approx(
            dense(jacobian, first.aim.numpy(), taken, chain.norms[0])[1], abs=1e-5
        )
    free = np.linalg.svd(taken)[2][4:]
    g = jacobian.T @ first.aim.numpy() / (first.aim @ first.aim).item()
    expected = (np.linalg.norm(free @ g) * max(chain.norms) / 0.5) ** 2
    figures = linear.run(narrower, Chain(study.base, chain, whole.stored), "spectrum", [0])["summary"]
    (found,) = [row["value"] for row in figures if row["figure"] == "jacobian_most_below_half"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_each_vector_of_the_linear_chain_is_the_best_beside_those_before(study, chain):
    """The linear chain takes what serves it best, so later vectors of its own are no better than after random ones."""
    rows = evaluate("linear", study, chain)["linear"]
    for of in ("linear", "random"):
        losses = {row["index"]: row["linear_loss"] for row in rows_of(rows, kind=of)}
        assert losses[1] == pytest.approx(rows_of(rows, kind="chain", index=1)[0]["linear_loss"], abs=1e-5)
    last = max(chain.index)
    least = {kind: rows_of(rows, kind=kind, index=last)[0]["linear_loss"] for kind in ("linear", "random")}
    assert least["linear"] > least["random"]


def test_a_full_rank_has_all_dimensions():
    assert spectrum(torch.eye(9, dtype=torch.float64))["effective_rank"] == pytest.approx(9)
    assert linear.spectrum(torch.diag(torch.tensor([5.0, 0, 0], dtype=torch.float64)))[
        "effective_rank"
    ] == pytest.approx(1)


def test_of_a_rotation_the_linear_chain_has_one_vector(study, chain):
    """All that is orthogonal to the solution moves z orthogonally to the aim."""
    rotation = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0)).double()).Q
    aim = rotation @ torch.linalg.qr(torch.stack([study.base.double(), chain.theta[0].double()]).T).Q[:, 1]
    first = Map(rotation, aim)
    ((_, loss),) = best_at_norms(first, torch.nn.functional.normalize(study.base.double()[None], dim=-1), [4.0])
    assert loss < 1e-6
    assert len(linear.linear_chain(study, first, chain)) == 2


def test_no_linear_chain_has_more_vectors_than_the_bound_and_one_reaches_it():
    """With g = Jᵀa / ‖a‖² along (1, 1, 1, 1) / 2, four axes share it equally, and each has a quarter of its square."""
    jacobian, aim = torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64), torch.eye(D_MODEL, dtype=torch.float64)[0]
    jacobian[0, :4] = 0.5
    assert linear.most(linear.gradient_of(Map(jacobian, aim)), 1.0, 0.5) == pytest.approx(4)
    losses = [float((jacobian @ axis - aim).norm()) for axis in torch.eye(D_MODEL, dtype=torch.float64)]
    assert sum(loss <= 0.5 for loss in losses) == 4
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(D_MODEL, D_MODEL)))[0]
    assert sum(np.linalg.norm(jacobian.numpy() @ row - aim.numpy()) <= 0.5 for row in basis) <= 4
