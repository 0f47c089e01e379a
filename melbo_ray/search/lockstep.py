"""The one loop that drives solvers: every evaluation of all of them is a pass through the slice for all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.config import ChainOptions
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.solvers import BlockSolver, Solution


@runtime_checkable
class Goal(Protocol):
    """What vectors are sought for, such as a `Chain`.

    Attributes:
        slice: what θ goes through, the same for all that are sought together.
        row: of the prompt in the slice.
        z_base: (d_model,) float32, the z to come near to.
        options: how z and the loss are defined, the same for all.
    """

    slice: Slice
    row: int
    z_base: Tensor
    options: ChainOptions


G = TypeVar("G", bound=Goal)


@dataclass(frozen=True)
class Step(Generic[G]):
    """An evaluation for a goal's solver.

    Attributes:
        goal: whose.
        theta: (block, d_model) float32, what was evaluated.
        losses: (block,) float32, ‖z(θ) − z(θ₀)‖ + λ‖θ‖.
        solution: what the solver ended with; None where it goes on.
    """

    goal: G
    theta: Float[Tensor, "block d_model"]
    losses: Float[Tensor, " block"]
    solution: Solution | None


def steps(solvers: dict[G, BlockSolver]) -> Iterator[Step[G]]:
    """Drive solvers in lockstep to their ends, a batch of all their requests at a time: every evaluation, in order.

    A solver that ends leaves `solvers`; the next one of its goal may be put there before the next step is asked for.
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
    """‖z(θ) − z(θ₀)‖ + λ‖θ‖ of each row and its gradient, on the CPU; a longer θ is first shortened to `max_norm`."""
    inputs = (value.to(slice.model.device) for value in (theta, z_base, rows))
    losses, gradient = slice.value_and_grad(
        *inputs, z_from=options.z_from, norm_penalty=options.norm_penalty, max_norm=options.max_norm
    )
    return losses.cpu(), gradient.cpu()
