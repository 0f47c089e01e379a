"""Solvers for a vector's loss: the post's Adam, and L-BFGS in the orthogonal complement; for blocks of vectors.

A solver is a coroutine in two beats: it yields the θ to evaluate and receives (loss, gradient), tensors on θ's device;
then it yields the figures by which it decides, and receives them as floats. So a loop over several solvers evaluates
all their requests in one pass through the model, and fetches the figures of all at once: the only time that the host
waits for the device. Its return value is a `Solution`.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.search.subspace import disentangle

Vector = Float[Tensor, " d_model"]
# What is sent is (loss, gradient) after a θ, and list[float] after figures.
Solver = Generator[Tensor, Any, "Solution"]
BlockSolver = Generator[Tensor, Any, "Solution"]

_HISTORY = 50
_PATIENCE = 10
_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 1e-6
_LEAST = 1e-30


@dataclass(frozen=True)
class Solution:
    """The result of a solver.

    Attributes:
        theta: the final θ, (d_model,), or (block, d_model) from a `BlockSolver`.
        evaluations: number of loss-and-gradient evaluations.
        stop_reason: `converged`, `max_evaluations` or `line_search`.
    """

    theta: Tensor
    evaluations: int
    stop_reason: str


def adam(start: Vector, *, steps: int, lr: float, remove: Callable[[Vector], Vector]) -> Solver:
    """The post's solver: `steps` steps of Adam, with the projection `remove` onto the complement after each.

    Source: "MELBO-ortho" in the post, where lr is 0.01 at R = 7. As there, all steps are run and the last θ is
    returned.
    """
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        _, theta.grad = yield theta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            theta.copy_(remove(theta.detach()))
        yield theta.new_empty(0)
    return Solution(theta.detach(), steps, "max_evaluations")


def lbfgs(
    start: Vector,
    *,
    budget: int,
    tolerance: float,
    first_step: float,
    remove: Callable[[Vector], Vector],
    preconditioner: Vector | float = 1.0,
) -> Solver:
    """L-BFGS in the complement, in the coordinates θ / `preconditioner`; iterates stay in it if `start` does.

    The objective is ½ loss², which is smooth at loss 0. The first step has length `first_step`; later the inverse
    Hessian starts from γI, γ = sᵀy / yᵀy of the newest pair, so the scales of loss and θ do not matter. The line search
    is Armijo backtracking; pairs without positive curvature are skipped (Nocedal and Wright 2006, algorithms 7.5 and
    3.1, equation 7.20).

    Args:
        start: initial θ, in the complement.
        budget: maximum number of evaluations.
        tolerance: relative decrease of the loss over ten evaluations below which the solver stops; 0 disables this.
        first_step: length of the first trial step (residual-stream units).
        remove: projection onto the complement.
        preconditioner: a positive factor for each coordinate, of which only ratios matter.
    """
    x, pairs, losses = start.double(), deque(maxlen=_HISTORY), []

    def of_square(loss: Tensor, gradient: Vector) -> Vector:
        return loss.double() * preconditioner * remove(gradient).double()

    def done() -> str | None:
        if len(losses) >= budget:
            return "max_evaluations"
        recent = min(losses[-_PATIENCE:]) if len(losses) > _PATIENCE else 0.0
        settled = len(losses) > _PATIENCE and min(losses[:-_PATIENCE]) - recent < tolerance * recent
        return "converged" if settled else None

    loss, gradient = yield x.float()
    gradient = of_square(loss, gradient)
    losses += yield loss.double()[None]
    value = losses[0] ** 2 / 2
    while (reason := done()) is None:
        direction = -_newton(pairs, gradient)
        move = remove(preconditioner * direction).double()
        if not pairs:
            longer = first_step / move.norm().clamp(min=_LEAST)
            direction, move = longer * direction, longer * move
        steepness, step = gradient @ direction, 1.0
        while True:
            trial = x + step * move
            loss, trial_gradient = yield trial.float()
            trial_gradient = of_square(loss, trial_gradient)
            s, y = step * direction, trial_gradient - gradient
            least = 1e-10 * s.norm() * y.norm()
            loss, slope, curvature, least = yield torch.stack([loss.double(), steepness, s @ y, least])
            losses.append(loss)
            trial_value = loss**2 / 2
            if trial_value <= value + _SUFFICIENT_DECREASE * step * slope:
                break
            if len(losses) >= budget:
                return Solution(x.float(), len(losses), "max_evaluations")
            # Minimum of the interpolating parabola, safeguarded at both ends; NaN halves the step.
            parabola = -slope * step**2 / (2 * (trial_value - value - slope * step))
            step = min(max(parabola, 0.1 * step), 0.5 * step) if math.isfinite(parabola) else 0.5 * step
            if step < _SMALLEST_STEP:
                return Solution(x.float(), len(losses), "line_search")
        if curvature > least:
            pairs.append((s, y, curvature))
        x, value, gradient = trial, trial_value, trial_gradient
    return Solution(x.float(), len(losses), reason)


def block(solver: Solver, size: int) -> BlockSolver:
    """Optimise `size` mutually orthogonal vectors jointly, with a solver for their concatenation.

    The solver's loss is the root of the sum of the squared losses. The rows are orthogonalised (`disentangle`) before
    evaluation, and the gradient is propagated through that. A block of one is the solver itself.
    """
    theta = next(solver)
    while True:
        free = theta.view(size, -1).detach().requires_grad_()
        rows = disentangle(free).float() if size > 1 else free
        losses, gradients = yield rows.detach()
        loss = losses.norm()
        (gradient,) = torch.autograd.grad(rows, free, gradients * (losses / loss.clamp(min=_LEAST))[:, None])
        figures = yield solver.send((loss, gradient.reshape(-1)))
        try:
            theta = solver.send(figures)
        except StopIteration as finished:
            best = finished.value.theta.view(size, -1)
            return dataclasses.replace(finished.value, theta=disentangle(best).float() if size > 1 else best)


def _newton(pairs: deque, gradient: Vector) -> Vector:
    """The inverse Hessian times the gradient; on a device in few operations, of which two loops would take hundreds."""
    return _compact(pairs, gradient) if pairs and gradient.device.type != "cpu" else _two_loops(pairs, gradient)


def _compact(pairs: deque, gradient: Vector) -> Vector:
    """The same as `_two_loops` up to rounding (Byrd, Nocedal and Schnabel 1994, equation 3.1): no value is fetched.

    With s, y the rows of S, Y, R the upper triangle of S Yᵀ and D its diagonal: H g = γ (g − Yᵀu) + Sᵀw, where
    R u = S g and Rᵀ w = D u + γ (Y Yᵀ u − Y g).
    """
    s, y = (torch.stack([pair[part] for pair in pairs]) for part in (0, 1))
    products, squares = s @ y.T, y @ y.T
    gamma = products[-1, -1] / squares[-1, -1]
    r, p = products.triu(), torch.stack([s @ gradient, y @ gradient], -1)
    u = torch.linalg.solve_triangular(r, p[:, :1], upper=True)
    right = products.diagonal()[:, None] * u + gamma * (squares @ u - p[:, 1:])
    w = torch.linalg.solve_triangular(r.T, right, upper=False)
    return gamma * (gradient - (u.T @ y)[0]) + (w.T @ s)[0]


def _two_loops(pairs: deque, gradient: Vector) -> Vector:
    """The inverse Hessian times the gradient, from γI (Nocedal and Wright 2006, algorithm 7.4, equation 7.20)."""
    q, alphas = gradient.clone(), []
    for s, y, sy in reversed(pairs):
        alphas.append(float(s @ q) / sy)
        q -= alphas[-1] * y
    if pairs:
        _, y, sy = pairs[-1]
        q *= sy / float(y @ y)
    for (s, y, sy), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - float(y @ q) / sy)
    return q
