from collections import deque

import numpy as np
import pytest
import scipy.optimize
import torch

from melbo_ray.search.solvers import _compact, _two_loops, adam, block, lbfgs
from melbo_ray.search.subspace import Subspace


def answer(solver, loss, gradient):
    """Send loss and gradient, then the figures that the solver asks for; the next θ."""
    return solver.send(solver.send((torch.as_tensor(loss), gradient)).tolist())


def solve(solver, function):
    """Drive a solver with a differentiable loss of θ."""
    theta = next(solver)
    while True:
        theta = theta.clone().requires_grad_()
        loss = function(theta)
        (gradient,) = torch.autograd.grad(loss, theta)
        try:
            theta = answer(solver, loss.detach(), gradient)
        except StopIteration as finished:
            return finished.value


def residuals(theta):
    """Rosenbrock's function is half the squared norm of these (times √2)."""
    return torch.cat([10 * (theta[1:] - theta[:-1] ** 2), 1 - theta[:-1]]) * 2**0.5


def rosenbrock(theta):
    return residuals(theta).square().sum() / 2


def free(vector):
    return vector


def minimise(start, function, remove=free, budget=200, tolerance=0.0, first_step=1.0):
    return solve(lbfgs(start, budget=budget, tolerance=tolerance, first_step=first_step, remove=remove), function)


def test_lbfgs_finds_scipys_minimum_in_as_few_evaluations():
    start = torch.full((10,), -0.5)
    theirs = scipy.optimize.minimize(
        lambda x: float(rosenbrock(torch.tensor(x))), start.numpy(), method="L-BFGS-B",
        jac=scipy.optimize.rosen_der, options={"maxcor": 50},
    )  # fmt: skip
    ours = minimise(start, lambda x: residuals(x).norm(), budget=theirs.nfev + 10)
    assert float(rosenbrock(ours.theta)) < 1e-5


def test_lbfgs_stays_in_the_complement_and_finds_the_constrained_minimum():
    subspace = Subspace(4, capacity=1)
    subspace.add(torch.tensor([1.0, 1, 0, 0]))
    wanted = torch.tensor([3.0, 1, 2, -1])
    start = subspace.remove(torch.tensor([0.0, 1, 1, 1]))
    found = minimise(start, lambda theta: (torch.arange(1.0, 5).sqrt() * (theta - wanted)).norm(), subspace.remove)
    # Stationary on the plane x₀ + x₁ = 0, by hand: 1 (x₀ − 3) = 2 (x₁ − 1).
    torch.testing.assert_close(found.theta, torch.tensor([1 / 3, -1 / 3, 2, -1]), atol=1e-4, rtol=0)


def test_neither_the_scale_of_the_loss_nor_that_of_the_vector_matters():
    start = torch.randn(8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

    def found(loss_scale, scale):
        loss = lambda x: loss_scale * (rows @ (x / scale) - 1).norm()  # noqa: E731
        return minimise(scale * start, loss, budget=12, first_step=scale).theta / scale

    for loss_scale, scale in (1e3, 1.0), (1e-3, 1.0), (1.0, 1e3), (1.0, 1e-3):
        torch.testing.assert_close(found(loss_scale, scale), found(1.0, 1.0), atol=1e-3, rtol=1e-3)


def test_preconditioned_it_finds_what_it_finds_in_the_coordinates_theta_over_factors():
    factors = torch.tensor([0.1, 1, 10, 2, 0.5]).double()
    start = torch.full((5,), -0.5).double()
    plain = solve(lbfgs(start, budget=12, tolerance=0, first_step=0.1, remove=free),
                  lambda phi: residuals(phi.double()).norm())  # fmt: skip
    first = float((factors * plain_first_step(start)).norm())
    found = solve(lbfgs(start * factors, budget=12, tolerance=0, first_step=first, remove=free, preconditioner=factors),
                   lambda theta: residuals(theta.double() / factors).norm())  # fmt: skip
    torch.testing.assert_close(found.theta, (plain.theta.double() * factors).float(), rtol=1e-3, atol=1e-4)


def plain_first_step(start):
    """The first step of length 0.1 down the gradient of Rosenbrock's function."""
    point = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rosenbrock(point), point)
    return -0.1 * gradient / gradient.norm()


def test_a_preconditioner_makes_a_sphere_of_an_ellipsoid():
    weights = torch.logspace(-1, 1, 40, dtype=torch.float64)
    left = {}
    for name, factors in ("plain", 1.0), ("preconditioned", 1 / weights):
        found = solve(lbfgs(torch.ones(40), budget=6, tolerance=0, first_step=0.1, remove=free, preconditioner=factors),
                      lambda theta: (weights * theta.double()).norm())  # fmt: skip
        left[name] = float((weights * found.theta.double()).norm())
    assert left["preconditioned"] < 1e-5 < left["plain"]


def test_the_first_trial_is_one_first_step_along_the_gradient():
    solver = lbfgs(torch.zeros(2), budget=9, tolerance=0, first_step=3.0, remove=free)
    next(solver)
    torch.testing.assert_close(answer(solver, 7.0, torch.tensor([0.6, -0.8])), torch.tensor([-1.8, 2.4]))


def test_lbfgs_spends_no_more_than_its_budget_and_says_why_it_stopped():
    start = torch.full((6,), -1.0)
    spent = minimise(start, lambda x: residuals(x).norm(), budget=7)
    assert (spent.evaluations, spent.stop_reason) == (7, "max_evaluations")
    easy = minimise(start, lambda x: (1 + x.square().sum()).sqrt(), budget=500, tolerance=0.01)
    assert easy.stop_reason == "converged"
    assert easy.evaluations < 40


def test_lbfgs_steps_back_from_losses_that_are_not_finite():
    def walled(theta):
        return torch.where(theta[0] > 1, torch.nan, (theta - 0.9).norm())

    found = minimise(torch.zeros(2), walled, first_step=5.0, budget=60)
    torch.testing.assert_close(found.theta, torch.full((2,), 0.9), atol=1e-3, rtol=0)


def test_lbfgs_gives_up_where_no_step_helps():
    calls = iter(range(1000))
    stuck = minimise(torch.ones(3), lambda theta: theta.sum() * 1e-3 + next(calls), budget=100)
    assert stuck.stop_reason == "line_search"
    torch.testing.assert_close(stuck.theta, torch.ones(3))


def test_adam_is_torchs_adam_with_a_projection_after_each_step():
    subspace = Subspace(5, capacity=1)
    subspace.add(torch.tensor([1.0, 2, 3, 4, 5]))
    start = subspace.remove(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    ours = solve(adam(start, steps=25, lr=0.1, remove=subspace.remove), rosenbrock)

    theta = start.double().numpy().copy()
    first, second, unit = np.zeros(5), np.zeros(5), np.array([1.0, 2, 3, 4, 5]) / np.sqrt(55)
    for step in range(1, 26):
        gradient = scipy.optimize.rosen_der(theta)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        theta -= 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        theta -= (theta @ unit) * unit
    np.testing.assert_allclose(ours.theta.numpy(), theta, rtol=1e-3, atol=1e-4)
    assert ours.evaluations == 25
    assert float(subspace.remove(ours.theta).norm()) == pytest.approx(float(ours.theta.norm()), rel=1e-5)


def test_a_block_finds_the_orthogonal_vectors_nearest_to_what_each_of_its_rows_wants():
    wanted = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    solver = block(lbfgs(torch.eye(3, 8).flatten(), budget=300, tolerance=0, first_step=1.0, remove=free), 3)
    theta = next(solver)
    while True:
        try:
            theta = answer(solver, (theta - wanted).norm(dim=-1), torch.nn.functional.normalize(theta - wanted, dim=-1))
        except StopIteration as finished:
            found = finished.value.theta.double().numpy()
            break
    gram = found @ found.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)

    def distance(x):
        q, _ = np.linalg.qr(x.reshape(3, 8).T)
        norms = np.einsum("ij,ji->i", wanted.numpy(), q)  # the best norm along each direction
        return float(np.square(norms[:, None] * q.T - wanted.numpy()).sum())

    theirs = min(scipy.optimize.minimize(distance, start).fun for start in (wanted.flatten(), np.eye(3, 8).flatten()))
    assert float(np.square(found - wanted.numpy()).sum()) == pytest.approx(theirs, rel=1e-3)


def test_few_operations_give_what_two_loops_over_the_pairs_give():
    generator = torch.Generator().manual_seed(0)
    hessian = torch.randn(30, 30, dtype=torch.float64, generator=generator)
    hessian = hessian @ hessian.T + torch.eye(30)
    pairs, gradient = deque(), torch.randn(30, dtype=torch.float64, generator=generator)
    for count in range(1, 20):
        s = torch.randn(30, dtype=torch.float64, generator=generator) * 10.0 ** (count % 3)
        pairs.append((s, hessian @ s, float(s @ hessian @ s)))
        torch.testing.assert_close(_compact(pairs, gradient), _two_loops(pairs, gradient), rtol=1e-9, atol=1e-9)
