"""The two ways to minimise a vector's loss: the post's Adam, and L-BFGS inside the complement.

A solver is a coroutine: it yields the θ it wants evaluated and is sent back (loss, gradient), so that whoever drives
several of them can evaluate all their requests in one pass through the model. Its return value is a `Solution`.
"""

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " d_model"]
Solver = Generator[Vector, tuple[float, Vector], "Solution"]

_HISTORY = 50
_PATIENCE = 10
_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 1e-6


@dataclass(frozen=True)
class Solution:
    """The best θ a solver saw, how many evaluations it took, and why it stopped."""

    theta: Vector
    evaluations: int
    stop_reason: str


def adam(start: Vector, *, steps: int, lr: float, remove: Callable[[Vector], Vector]) -> Solver:
    """The post's solver: Adam with `remove` (the projection onto the complement) after every step; `steps` steps.

    Source: "MELBO-ortho" in the post; lr is 0.01 at R = 7. Always runs all its steps and returns the last θ, as there.
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
    """L-BFGS on the complement: the gradient is projected, so every iterate lies in it if `start` does.

    Armijo backtracking; a pair whose curvature is not positive is left out (Nocedal and Wright 2006, algorithms 7.4
    and 3.1). Against torch's strong-Wolfe L-BFGS it needs as many evaluations to the same loss (DEVLOG).

    Args:
        start: first θ, in the complement.
        budget: evaluations at most.
        tolerance: stop when the last ten evaluations lowered the loss by less than this fraction; 0 never does.
        first_step: length of the first step (residual-stream units).
        remove: projection onto the complement.
    """
    x, pairs, losses = start.double(), deque(maxlen=_HISTORY), []

    def done() -> str | None:
        if len(losses) >= budget:
            return "max_evaluations"
        recent = min(losses[-_PATIENCE:]) if len(losses) > _PATIENCE else 0.0
        settled = len(losses) > _PATIENCE and min(losses[:-_PATIENCE]) - recent < tolerance * recent
        return "converged" if settled else None

    loss, gradient = yield x.float()
    gradient = remove(gradient).double()
    losses.append(loss)
    while (reason := done()) is None:
        direction = -_inverse_hessian(pairs, gradient, first_step)
        slope, step = float(gradient @ direction), 1.0
        while True:
            trial = x + step * direction
            trial_loss, trial_gradient = yield trial.float()
            losses.append(trial_loss)
            if trial_loss <= loss + _SUFFICIENT_DECREASE * step * slope:
                break
            if len(losses) >= budget:
                return Solution(x.float(), len(losses), "max_evaluations")
            # The minimum of the parabola through what is known, kept away from both ends; NaN halves the step.
            parabola = -slope * step**2 / (2 * (trial_loss - loss - slope * step))
            step = min(max(parabola, 0.1 * step), 0.5 * step) if math.isfinite(parabola) else 0.5 * step
            if step < _SMALLEST_STEP:
                return Solution(x.float(), len(losses), "line_search")
        trial_gradient = remove(trial_gradient).double()
        s, y = trial - x, trial_gradient - gradient
        if s @ y > 1e-10 * s.norm() * y.norm():
            pairs.append((s, y, float(s @ y)))
        x, loss, gradient = trial, trial_loss, trial_gradient
    return Solution(x.float(), len(losses), reason)


def _inverse_hessian(pairs: deque, gradient: Vector, first_step: float) -> Vector:
    """The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), scaled by the newest pair."""
    q, alphas = gradient.clone(), []
    for s, y, sy in reversed(pairs):
        alphas.append(float(s @ q) / sy)
        q -= alphas[-1] * y
    if pairs:
        _, y, sy = pairs[-1]
        q *= sy / float(y @ y)
    else:
        q *= first_step / max(float(gradient.norm()), 1e-30)
    for (s, y, sy), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - float(y @ q) / sy)
    return q
