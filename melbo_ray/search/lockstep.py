"""The loop that drives solvers in lockstep: each pass through the slice evaluates the requests of all solvers."""

import itertools
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
        options: definition of z and of the loss, common to all goals; `max_norm` in residual-stream units.
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
        theta: the evaluated vectors, (block, d_model) float32, on the slice's device.
        losses: their losses ‖z(θ) − z(θ₀)‖ + λ‖θ‖, (block,) float32.
        solution: solution of the solver if it has ended, else None.
    """

    goal: G
    theta: Float[Tensor, "block d_model"]
    losses: Float[Tensor, " block"]
    solution: Solution | None


def steps(solvers: dict[G, BlockSolver]) -> Iterator[Step[G]]:
    """Run solvers in lockstep until all have ended, with their requests in one batch; yields every evaluation.

    A solver that ends is removed from `solvers`; the caller may insert its goal's next solver before resuming. On a
    device the batch keeps the rows of goals that have ended, so that no step is recorded or compiled anew, and the host
    waits once for an evaluation of all, to fetch the figures by which the solvers decide.
    """
    requests: dict[G, Tensor] = {}
    laid_out: tuple[list[G], list[int], Tensor, Tensor] | None = None
    while solvers:
        for goal in solvers.keys() - requests.keys():
            requests[goal] = next(solvers[goal])
        turn = sorted(requests, key=lambda goal: goal.row)
        sizes = [len(requests[goal]) for goal in turn]
        if laid_out is None or laid_out[:2] != (turn, sizes):
            laid_out = turn, sizes, *_layout(turn, sizes)
        theta = torch.cat([requests[goal] for goal in turn])
        answers = value_and_grad(turn[0].slice, theta, *laid_out[2:], turn[0].options)
        parts = zip(turn, *(part.split(sizes) for part in (theta, *answers)), strict=True)
        evaluated = [part for part in parts if part[0] in solvers]
        asked = [solvers[goal].send((losses, gradients)) for goal, _, losses, gradients in evaluated]
        figures = iter(torch.cat(asked).tolist())
        for (goal, theta, losses, _), values in zip(evaluated, asked, strict=True):
            try:
                requests[goal], solution = solvers[goal].send(list(itertools.islice(figures, len(values)))), None
            except StopIteration as finished:
                del solvers[goal]
                solution = finished.value
            yield Step(goal, theta, losses, solution)
            if solution is not None:
                _leave(requests, solvers, goal)


def _leave(requests: dict[G, Tensor], solvers: dict[G, BlockSolver], goal: G) -> None:
    """Start the next solver of a goal whose last one has ended; without one its row leaves the batch on the CPU."""
    if goal in solvers:
        requests[goal] = next(solvers[goal])
    elif goal.slice.model.device.type == "cpu":
        del requests[goal]


def _layout(turn: list[G], sizes: list[int]) -> tuple[Float[Tensor, "batch d_model"], Int[Tensor, " batch"]]:
    """The targets and the prompts' rows of a batch, on the slice's device."""
    device = turn[0].slice.model.device
    z_base = torch.cat([goal.z_base.expand(size, -1) for goal, size in zip(turn, sizes, strict=True)])
    rows = torch.repeat_interleave(torch.tensor([goal.row for goal in turn]), torch.tensor(sizes))
    return z_base.to(device), rows.to(device)


def value_and_grad(
    slice: Slice,
    theta: Float[Tensor, "batch d_model"],
    z_base: Float[Tensor, "batch d_model"],
    rows: Int[Tensor, " batch"],
    options: ChainOptions,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"]]:
    """The loss ‖z(θ) − z(θ₀)‖ + λ‖θ‖ of each row and its gradient; θ is first shortened to `max_norm`.

    The results are on the slice's device, where the inputs are moved if they are elsewhere.
    """
    progress.passes += 1
    inputs = (value.to(slice.model.device) for value in (theta, z_base, rows))
    losses, gradient = slice.value_and_grad(
        *inputs, z_from=options.z_from, norm_penalty=options.norm_penalty, max_norm=options.limit
    )
    return losses, gradient
