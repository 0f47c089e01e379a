import numpy as np
import pytest
import scipy.optimize
import torch

from melbo_ray.solvers import adam, lbfgs
from melbo_ray.subspace import Subspace


def solve(solver, function):
    """Drive a solver with a differentiable function of θ."""
    theta = next(solver)
    while True:
        theta = theta.clone().requires_grad_()
        loss = function(theta)
        (gradient,) = torch.autograd.grad(loss, theta)
        try:
            theta = solver.send((float(loss.detach()), gradient))
        except StopIteration as finished:
            return finished.value


def rosenbrock(theta):
    return (100 * (theta[1:] - theta[:-1] ** 2) ** 2 + (1 - theta[:-1]) ** 2).sum()


def free(vector):
    return vector


def test_lbfgs_finds_scipys_minimum_in_about_as_many_evaluations():
    start = np.full(10, -0.5)
    theirs = scipy.optimize.minimize(
        lambda x: float(rosenbrock(torch.tensor(x))), start, method="L-BFGS-B",
        jac=scipy.optimize.rosen_der, options={"maxcor": 50},
    )  # fmt: skip
    ours = solve(
        lbfgs(torch.tensor(start).float(), budget=200, tolerance=1e-6, first_step=0.1, remove=free), rosenbrock
    )
    assert float(rosenbrock(ours.theta)) < 1e-6
    assert ours.evaluations <= 2 * theirs.nfev


def test_lbfgs_stays_in_the_complement_and_finds_the_constrained_minimum():
    subspace = Subspace(4, capacity=1)
    subspace.add(torch.tensor([1.0, 1, 0, 0]))
    wanted = torch.tensor([3.0, 1, 2, -1])
    start = subspace.remove(torch.tensor([0.0, 1, 1, 1]))
    found = solve(
        lbfgs(start, budget=60, tolerance=0, first_step=0.5, remove=subspace.remove),
        lambda theta: (theta - wanted).square().sum() + (theta - wanted)[2:].pow(4).sum(),
    )
    # The nearest point of the plane x₀ + x₁ = 0, by hand.
    torch.testing.assert_close(found.theta, torch.tensor([1.0, -1, 2, -1]), atol=1e-2, rtol=0)


def test_lbfgs_spends_no_more_than_its_budget_and_says_why_it_stopped():
    start = torch.full((6,), -1.0)
    spent = solve(lbfgs(start, budget=7, tolerance=0, first_step=0.1, remove=free), rosenbrock)
    assert (spent.evaluations, spent.stop_reason) == (7, "max_evaluations")
    easy = solve(lbfgs(start, budget=500, tolerance=0.01, first_step=0.1, remove=free), lambda x: 1 + x.square().sum())
    assert easy.stop_reason == "converged"
    assert easy.evaluations < 40


def test_lbfgs_steps_back_from_losses_that_are_not_finite():
    def walled(theta):
        return torch.where(theta[0] > 1, torch.nan, (theta - 0.9).square().sum())

    found = solve(lbfgs(torch.zeros(2), budget=60, tolerance=0, first_step=5.0, remove=free), walled)
    torch.testing.assert_close(found.theta, torch.full((2,), 0.9), atol=1e-3, rtol=0)


def test_lbfgs_gives_up_where_no_step_helps():
    calls = iter(range(1000))
    stuck = solve(
        lbfgs(torch.ones(3), budget=100, tolerance=0, first_step=1.0, remove=free),
        lambda theta: theta.sum() * 1e-3 + next(calls),
    )
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
