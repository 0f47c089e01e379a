"""The chain (MELBO-ortho): vectors that do what the base does, every one orthogonal to all the others.

Source: "I found >800 orthogonal 'write code' steering vectors" (2024): for each new θ minimise ‖z(θ) − z(θ₀)‖₂, z the
mean over the prompt's positions of the target layer's residual stream, θ in the complement of every earlier vector.
Here z leaves the first position out by default (`z_from`): in many models it is an attention sink (docs/footguns.md).
"""

import math
import time
from collections.abc import Generator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.solvers import BlockSolver, Solution, adam, block, lbfgs
from melbo_ray.search.subspace import Subspace
from melbo_ray.search.vectors import SteeringVector
from melbo_ray.seeds import derive_seed


def chain(
    slice: Slice,
    base: Float[Tensor, "*more d_model"],
    config: Config,
    concept: str = "code",
    earlier: Sequence[SteeringVector] = (),
) -> Generator[SteeringVector, None, str]:
    """The vectors of one concept's chain, in order, after those in `earlier`; returns why it stopped.

    `base` is θ₀, whose z is the target; where it has more rows, their directions are out of bounds as θ₀'s is.
    A chain stops at `num_vectors`, or when a vector's norm or effect has vanished (`min_norm`, `max_relative_loss`;
    that vector is still given). The same seed gives the same vectors whether or not the chain was interrupted.

    Raises:
        UserError: more vectors than d_model − 1, or a loss that is not finite.
    """
    stopped: dict[str, str] = {}
    for _, vector in chains(slice, {concept: base}, config, {concept: earlier}, stopped):
        yield vector
    return stopped[concept]


def chains(
    slice: Slice,
    bases: Mapping[str, Float[Tensor, "*more d_model"]],
    config: Config,
    earlier: Mapping[str, Sequence[SteeringVector]],
    stopped: dict[str, str],
) -> Generator[tuple[str, SteeringVector], None, None]:
    """Several concepts' chains in lockstep, one pass through the slice for all: (concept, vector) as they are found.

    Row i of the slice is the prompt of the i-th concept in `bases`. Why each chain stopped goes into `stopped`.
    """
    running: dict[int, tuple[_Chain, BlockSolver]] = {}
    requests: dict[int, Tensor] = {}

    def start_next(row: int, link: _Chain) -> None:
        if (reason := link.stop_reason()) is not None:
            stopped[link.concept] = reason
            running.pop(row, None)
            requests.pop(row, None)
            return
        solver = link.solver()
        running[row], requests[row] = (link, solver), next(solver)

    for row, (concept, base) in enumerate(bases.items()):
        start_next(row, _Chain(slice, row, base, config, concept, earlier.get(concept, ())))
    while running:
        rows, sizes = list(running), [len(requests[row]) for row in running]
        places = torch.repeat_interleave(torch.tensor(rows), torch.tensor(sizes))
        z_base = torch.stack([running[row][0].z_base for row in places.tolist()])
        theta = torch.cat([requests[row] for row in rows])
        answers = (part.split(sizes) for part in value_and_grad(slice, theta, z_base, places, config))
        for row, losses, gradients in zip(rows, *answers, strict=True):
            link, solver = running[row]
            try:
                requests[row] = solver.send((losses, gradients))
            except StopIteration as finished:
                for vector in link.add(finished.value):
                    yield link.concept, vector
                start_next(row, link)


def value_and_grad(
    slice: Slice,
    theta: Float[Tensor, "batch d_model"],
    z_base: Float[Tensor, "batch d_model"],
    rows: Int[Tensor, " batch"],
    config: Config,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"]]:
    """‖z(θ) − z(θ₀)‖ + λ‖θ‖ of each row and its gradient, on the CPU; a longer θ is first shortened to `max_norm`."""
    inputs = (value.to(slice.model.device) for value in (theta, z_base, rows))
    options = {"z_from": config.z_from, "norm_penalty": config.norm_penalty, "max_norm": config.max_norm}
    losses, gradient = slice.value_and_grad(*inputs, **options)
    return losses.cpu(), gradient.cpu()


class _Chain:
    """One concept's chain: the subspace already taken, and how the next vector is sought and certified."""

    def __init__(
        self, slice: Slice, row: int, base: Tensor, config: Config, concept: str, earlier: Sequence[SteeringVector]
    ) -> None:
        d_model = slice.model.d_model
        if config.num_vectors > d_model - 1:
            raise UserError(
                f"{config.num_vectors} vectors are more than can be orthogonal to the base: "
                f"expected at most d_model - 1 = {d_model - 1}"
            )
        self.slice, self.row, self.config, self.concept = slice, torch.tensor([row]), config, concept
        self.base, *others = base.view(-1, d_model)
        size = min(d_model, config.num_vectors + config.block + len(others))
        self.subspace = Subspace(d_model, size, slice.model.device)
        # A block that was interrupted is sought anew: its vectors depend on each other.
        whole = len(earlier) // config.block * config.block
        self.stored = list(earlier)
        for direction in (self.base, *others, *(vector.theta for vector in self.stored[:whole])):
            self.subspace.add(direction)
        self.last = self.stored[whole - 1] if whole else None
        self.radius = float(self.base.norm())
        length = int(slice.lengths[row])
        if config.z_from >= length:
            raise UserError(f"z would start at position {config.z_from}, and the prompt has {length}: start it earlier")
        self._from = [config.z_from, *range(min(2, length))]
        self._z_base = self._z(self.base)
        self.z_base = self._z_base[0]
        self.unsteered_losses = self._losses(torch.zeros_like(self.base))
        if self.unsteered_losses[0] == 0:
            raise UserError(f"the base vector of {concept!r} changes nothing at layer {slice.target}: choose another")

    @torch.no_grad()
    def _z(self, theta: Tensor) -> Float[Tensor, "means d_model"]:
        """The means of θ from `config.z_from`, from 0, and from 1 where there is another position."""
        device = self.slice.model.device
        row = self.row.to(device)
        h = self.slice.h_target(theta[None].to(device), row)
        return torch.cat([self.slice.mean(h, row, first) for first in self._from]).cpu()

    def _losses(self, theta: Tensor) -> list[float]:
        """‖z(θ) − z(θ₀)‖ by each of these z."""
        losses = (self._z(theta) - self._z_base).norm(dim=-1).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"the loss of {self.concept!r} is not finite: try --dtype float32 or a smaller --radius")
        return losses

    @property
    def index(self) -> int:
        """Index of the next vector."""
        return 1 if self.last is None else self.last.index + 1

    def stop_reason(self) -> str | None:
        """Why there is no next vector, or None."""
        if self.last is not None and self.last.norm <= self.config.min_norm:
            return "min_norm"
        if self.last is not None and self.last.relative_loss >= self.config.max_relative_loss:
            return "max_relative_loss"
        return "num_vectors" if max(self.index - 1, len(self.stored)) >= self.config.num_vectors else None

    def solver(self) -> BlockSolver:
        """A solver for the next vectors, each at its random start: norm R, direction uniform in the complement."""
        config, self.started, d_model = self.config, time.perf_counter(), self.slice.model.d_model
        size = min(config.block, d_model - self.subspace.size)
        self.seeds = [derive_seed(config.seed, self.concept, self.index + i, "start") for i in range(size)]
        starts = [torch.randn(d_model, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        start = self._remove(torch.cat(starts)).view(size, -1)
        start = (start / start.norm(dim=-1, keepdim=True) * self.radius).reshape(-1)
        if config.solver == "adam":
            lr = 0.01 * self.radius / 7
            return block(adam(start, steps=config.max_evaluations, lr=lr, remove=self._remove), size)
        solver = lbfgs(
            start,
            budget=config.max_evaluations,
            tolerance=config.tolerance,
            first_step=float(start.norm()),
            remove=self._remove,
        )
        return block(solver, size)

    def _remove(self, rows: Tensor) -> Tensor:
        return self.subspace.remove(rows.view(-1, self.slice.model.d_model)).view(-1)

    def add(self, solution: Solution) -> list[SteeringVector]:
        """Certify a solution's vectors and take their directions; those that were not stored already."""
        seconds = (time.perf_counter() - self.started) / len(solution.theta)
        first = self.index
        found = [self._certify(theta, solution, first + i, seconds) for i, theta in enumerate(solution.theta)]
        self.last = found[-1]
        return [vector for vector in found if len(self.stored) < vector.index <= self.config.num_vectors]

    def _certify(self, theta: Tensor, solution: Solution, index: int, seconds: float) -> SteeringVector:
        """The vector made exactly orthogonal and rounded to float32, with its certificate; its direction is taken.

        One that is stored stands as it is, whatever another machine's last bits are.
        """
        if index <= len(self.stored):
            self.subspace.add(self.stored[index - 1].theta)
            return self.stored[index - 1]
        if self.config.max_norm is not None:
            theta = theta * min(1.0, self.config.max_norm / float(theta.norm()))
        theta = self.subspace.remove_exact(theta).float()
        losses, norm = self._losses(theta), float(theta.norm())
        relative = [loss / unsteered for loss, unsteered in zip(losses, self.unsteered_losses, strict=True)]
        return SteeringVector(
            index=index,
            theta=theta,
            norm=norm,
            loss=losses[0],
            relative_loss=relative[0],
            relative_loss_from_0=relative[1],
            relative_loss_from_1=relative[2] if len(relative) > 2 else None,
            evaluations=solution.evaluations,
            stop_reason=solution.stop_reason,
            max_abs_cos=self.subspace.add(theta) if norm > 0 else 0.0,
            seconds=seconds,
            seed=self.seeds[index - self.index],
        )
