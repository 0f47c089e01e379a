"""Solvers for a vector's loss: the post's Adam, and L-BFGS in the orthogonal complement; for blocks of vectors.

A solver is a coroutine: it yields the θ to evaluate and receives (loss, gradient), so that a loop over several solvers
can evaluate all their requests in one pass through the model. Its return value is a `Solution`.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.search.subspace import disentangle

Vector = Float[Tensor, " d_model"]
Block = Float[Tensor, "block d_model"]
Solver = Generator[Vector, tuple[float, Vector], "Solution"]
BlockSolver = Generator[Block, tuple[Float[Tensor, " block"], Block], "Solution"]

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
    return Solution(theta.detach(), steps, "max_evaluations")


def lbfgs(
    start: Vector, *, budget: int, tolerance: float, first_step: float, remove: Callable[[Vector], Vector]
) -> Solver:
    """L-BFGS in the complement: the gradient is projected, so all iterates stay in it if `start` does.

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
    """
    x, pairs, losses = start.double(), deque(maxlen=_HISTORY), []

    def received(loss: float, gradient: Vector) -> tuple[float, Vector]:
        losses.append(loss)
        return loss**2 / 2, loss * remove(gradient).double()

    def done() -> str | None:
        if len(losses) >= budget:
            return "max_evaluations"
        recent = min(losses[-_PATIENCE:]) if len(losses) > _PATIENCE else 0.0
        settled = len(losses) > _PATIENCE and min(losses[:-_PATIENCE]) - recent < tolerance * recent
        return "converged" if settled else None

    value, gradient = received(*(yield x.float()))
    while (reason := done()) is None:
        direction = -_two_loops(pairs, gradient)
        if not pairs:
            direction *= first_step / direction.norm().clamp(min=_LEAST)
        slope, step = float(gradient @ direction), 1.0
        while True:
            trial = x + step * direction
            trial_value, trial_gradient = received(*(yield trial.float()))
            if trial_value <= value + _SUFFICIENT_DECREASE * step * slope:
                break
            if len(losses) >= budget:
                return Solution(x.float(), len(losses), "max_evaluations")
            # Minimum of the interpolating parabola, safeguarded at both ends; NaN halves the step.
            parabola = -slope * step**2 / (2 * (trial_value - value - slope * step))
            step = min(max(parabola, 0.1 * step), 0.5 * step) if math.isfinite(parabola) else 0.5 * step
            if step < _SMALLEST_STEP:
                return Solution(x.float(), len(losses), "line_search")
        s, y = trial - x, trial_gradient - gradient
        if s @ y > 1e-10 * s.norm() * y.norm():
            pairs.append((s, y, float(s @ y)))
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
        try:
            theta = solver.send((float(loss), gradient.reshape(-1)))
        except StopIteration as finished:
            best = finished.value.theta.view(size, -1)
            return dataclasses.replace(finished.value, theta=disentangle(best).float() if size > 1 else best)


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
