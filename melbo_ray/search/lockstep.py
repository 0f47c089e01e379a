"""The loop that drives solvers in lockstep: each pass through the slice evaluates the requests of all solvers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.config import ChainOptions
from melbo_ray.host import progress
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.solvers import BlockSolver, Solution


@runtime_checkable
class Goal(Protocol):
    """An optimisation problem for vectors, such as a `Chain`.

    Attributes:
        slice: the slice, common to all goals of a lockstep.
        row: row of the prompt in the slice.
        z_base: target z, (d_model,) float32.
        options: definition of z and of the loss, common to all goals.
    """

    slice: Slice
    row: int
    z_base: Tensor
    options: ChainOptions


G = TypeVar("G", bound=Goal)


@dataclass(frozen=True)
class Step(Generic[G]):
    """One evaluation of a solver.

    Attributes:
        goal: goal of the solver.
        theta: the evaluated vectors, (block, d_model) float32.
        losses: their losses ‖z(θ) − z(θ₀)‖ + λ‖θ‖, (block,) float32.
        solution: solution of the solver if it has ended, else None.
    """

    goal: G
    theta: Float[Tensor, "block d_model"]
    losses: Float[Tensor, " block"]
    solution: Solution | None


def steps(solvers: dict[G, BlockSolver]) -> Iterator[Step[G]]:
    """Run solvers in lockstep until all have ended, with their requests in one batch; yields every evaluation.

    A solver that ends is removed from `solvers`; the caller may insert its goal's next solver before resuming.
    """
    requests: dict[G, Tensor] = {}
    while solvers:
        for goal in solvers.keys() - requests.keys():
            requests[goal] = next(solvers[goal])
        turn = sorted(solvers, key=lambda goal: goal.row)
        thetas = [requests[goal] for goal in turn]
        sizes = [len(theta) for theta in thetas]
        rows = torch.repeat_interleave(torch.tensor([goal.row for goal in turn]), torch.tensor(sizes))
        z_base = torch.cat([goal.z_base.expand(size, -1) for goal, size in zip(turn, sizes, strict=True)])
        answers = value_and_grad(turn[0].slice, torch.cat(thetas), z_base, rows, turn[0].options)
        parts = (answer.split(sizes) for answer in answers)
        for goal, theta, losses, gradients in zip(turn, thetas, *parts, strict=True):
            try:
                requests[goal], solution = solvers[goal].send((losses, gradients)), None
            except StopIteration as finished:
                del solvers[goal], requests[goal]
                solution = finished.value
            yield Step(goal, theta, losses, solution)


def value_and_grad(
    slice: Slice,
    theta: Float[Tensor, "batch d_model"],
    z_base: Float[Tensor, "batch d_model"],
    rows: Int[Tensor, " batch"],
    options: ChainOptions,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"]]:
    """The loss ‖z(θ) − z(θ₀)‖ + λ‖θ‖ of each row and its gradient, on the CPU; θ is first shortened to `max_norm`."""
    progress.passes += 1
    inputs = (value.to(slice.model.device) for value in (theta, z_base, rows))
    losses, gradient = slice.value_and_grad(
        *inputs, z_from=options.z_from, norm_penalty=options.norm_penalty, max_norm=options.max_norm
    )
    return losses.cpu(), gradient.cpu()
