"""The chain (MELBO-ortho): mutually orthogonal vectors that copy the effect of the base.

Source: "I found >800 orthogonal 'write code' steering vectors" (2024): each new θ minimises ‖z(θ) − z(θ₀)‖₂, where z is
the mean of the target layer's residual stream over the prompt's positions, in the complement of all earlier vectors.
By default z omits the first position (`z_from`), which in many models is an attention sink (docs/footguns.md).
"""

import math
import time
from collections.abc import Generator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.config import ChainOptions
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.lockstep import steps
from melbo_ray.search.preconditioner import preconditioner
from melbo_ray.search.solvers import BlockSolver, Solution, adam, block, lbfgs
from melbo_ray.search.subspace import Subspace
from melbo_ray.search.vectors import SteeringVector
from melbo_ray.seeds import derive_seed

BEGIN = 0.25
"""L-BFGS begins at this part of R, with a first step as long: a random vector of a long base's norm is a poor start."""


def chain(
    slice: Slice,
    base: Float[Tensor, "*more d_model"],
    options: ChainOptions,
    concept: str = "code",
    earlier: Sequence[SteeringVector] = (),
) -> Generator[SteeringVector, None, str]:
    """Find the vectors of one concept's chain; yields them in order, and returns why the chain stopped.

    A chain stops at `num_vectors`, or after a vector whose norm or effect has vanished (`min_norm`,
    `max_relative_loss`). The same seed gives the same vectors, whether or not the chain was interrupted.

    Args:
        slice: the slice, on the concept's prompt.
        base: θ₀, (d_model,), whose z is the target; further rows, such as `Base.avoided`, are directions to which the
            chain is orthogonal too, linearly independent of it and of each other.
        options: number of vectors, solver and stopping rules.
        concept: name of the concept, from which seeds derive.
        earlier: vectors of the chain found before, from index 1; only later ones are yielded.

    Raises:
        UserError: more vectors than directions are left, no position for z, a base without effect, or a loss that is
            not finite.
    """
    stopped: dict[str, str] = {}
    for _, vector in chains(slice, {concept: base}, options, {concept: earlier}, stopped):
        yield vector
    return stopped[concept]


def chains(
    slice: Slice,
    bases: Mapping[str, Float[Tensor, "*more d_model"]],
    options: ChainOptions,
    earlier: Mapping[str, Sequence[SteeringVector]],
    stopped: dict[str, str],
) -> Generator[tuple[str, SteeringVector], None, None]:
    """Find the chains of several concepts in lockstep, batched in one slice; yields (concept, vector) as found.

    Row i of the slice is the prompt of the i-th concept in `bases`. The reason why each chain stopped is stored in
    `stopped`. The other arguments and the errors are those of `chain`, by concept; a `max_norm` in multiples of R takes
    bases of one norm.
    """
    solvers: dict[Chain, BlockSolver] = {}

    def begin(chain: Chain) -> None:
        if (reason := chain.stop_reason()) is None:
            solvers[chain] = chain.solver()
        else:
            stopped[chain.concept] = reason

    every = [
        Chain(slice, i, base, options, name, earlier.get(name, ())) for i, (name, base) in enumerate(bases.items())
    ]
    if len({chain.options.limit for chain in every}) > 1:
        raise UserError(
            f"`max_norm` {options.max_norm} differs between bases of several norms: find one chain at a time"
        )
    going = [chain.row for chain in every if chain.stop_reason() is None]
    if going and options.solver == "lbfgs":
        # Measured in a batch of the lockstep's size, for which the step is recorded or compiled anyway.
        preconditioner(slice, [row for row in going for _ in range(options.block)], every[0].options)
    for chain in every:
        begin(chain)
    for step in steps(solvers):
        if step.solution is not None:
            for vector in step.goal.add(step.solution):
                yield step.goal.concept, vector
            begin(step.goal)


class Chain:
    """The state of one concept's chain: the subspace taken so far, and the search for the next vectors.

    Args:
        slice: the slice.
        row: row of the concept's prompt in the slice.
        base: as in `chain`.
        options: as in `chain`.
        concept: name of the concept, from which seeds derive.
        earlier: vectors of the chain found before.
    """

    def __init__(
        self,
        slice: Slice,
        row: int,
        base: Float[Tensor, "*more d_model"],
        options: ChainOptions,
        concept: str,
        earlier: Sequence[SteeringVector] = (),
    ) -> None:
        self.base, *others = base.view(-1, slice.model.d_model)
        d_model, most = slice.model.d_model, slice.model.d_model - 1 - len(others)
        if options.num_vectors > most:
            also = f" and to {len(others)} directions more" if others else ""
            raise UserError(
                f"{options.num_vectors} vectors are more than can be orthogonal to the base{also}: "
                f"expected at most d_model - {d_model - most} = {most}"
            )
        self.radius = float(self.base.norm())
        self.slice, self.row, self.options, self.concept = slice, row, options.at(self.radius), concept
        size = min(d_model, options.num_vectors + options.block + len(others))
        self.subspace = Subspace(d_model, size, slice.model.device)
        # An interrupted block is optimised again, because its vectors depend on each other.
        whole = len(earlier) // options.block * options.block
        self.stored = list(earlier)
        self.subspace.extend(torch.stack([self.base, *others, *(vector.theta for vector in self.stored[:whole])]))
        self.last = self.stored[whole - 1] if whole else None
        length = int(slice.lengths[row])
        if options.z_from >= length:
            raise UserError(
                f"z would start at position {options.z_from}, and the prompt has {length}: start it earlier"
            )
        self._from = [options.z_from, *range(min(2, length))]
        self._z_base = self._z(self.base)
        self.z_base = self._z_base[0]
        self.unsteered_losses = self._losses(torch.zeros_like(self.base))
        if self.unsteered_losses[0] == 0:
            raise UserError(f"the base vector of {concept!r} changes nothing at layer {slice.target}: choose another")

    @torch.no_grad()
    def _z(self, theta: Tensor) -> Float[Tensor, "means d_model"]:
        """z(θ) over the positions from `options.z_from`, from 0, and from 1 if there is a second position."""
        device = self.slice.model.device
        row = torch.tensor([self.row], device=device)
        h = self.slice.h_target(theta[None].to(device), row)
        return torch.cat([self.slice.mean(h, row, first) for first in self._from])

    def _losses(self, theta: Tensor) -> list[float]:
        """‖z(θ) − z(θ₀)‖ for each z of `_z`."""
        losses = (self._z(theta) - self._z_base).norm(dim=-1).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"the loss of {self.concept!r} is not finite: try `dtype` float32 or a smaller `radius`")
        return losses

    @property
    def index(self) -> int:
        """Index of the next vector."""
        return 1 if self.last is None else self.last.index + 1

    def stop_reason(self) -> str | None:
        """The reason why the chain has ended, or None."""
        if self.last is not None and self.last.norm <= self.options.min_norm:
            return "min_norm"
        if self.last is not None and self.last.relative_loss >= self.options.max_relative_loss:
            return "max_relative_loss"
        return "num_vectors" if max(self.index - 1, len(self.stored)) >= self.options.num_vectors else None

    def start(self) -> Float[Tensor, "block d_model"]:
        """Vectors of norm R in seeded directions, uniform in the complement: Adam's start; L-BFGS takes `BEGIN` of it.

        The rows of a block are not yet orthogonal to each other.
        """
        d_model = self.slice.model.d_model
        size = min(self.options.block, d_model - self.subspace.size)
        self.seeds = [derive_seed(self.options.seed, self.concept, self.index + i, "start") for i in range(size)]
        starts = [torch.randn(d_model, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        start = self._remove(torch.cat(starts).to(self.slice.model.device)).view(size, -1)
        return start / start.norm(dim=-1, keepdim=True) * self.radius

    def solver(self, options: ChainOptions | None = None) -> BlockSolver:
        """A solver of the next vectors: Adam from `start`, L-BFGS from `BEGIN` of it; `options` replace the chain's."""
        options, self.started = options or self.options, time.perf_counter()
        rows = self.start()
        size, start = len(rows), rows.reshape(-1)
        if options.solver == "adam":
            lr = 0.01 * self.radius / 7
            return block(adam(start, steps=options.max_evaluations, lr=lr, remove=self._remove), size)
        start = BEGIN * start
        diagonal = preconditioner(self.slice, [self.row] * size, options)[self.row]
        solver = lbfgs(
            start,
            budget=options.max_evaluations,
            tolerance=options.tolerance,
            first_step=float(start.norm()),
            remove=self._remove,
            preconditioner=diagonal.repeat(size),
        )
        return block(solver, size)

    def _remove(self, rows: Tensor) -> Tensor:
        return self.subspace.remove(rows.view(-1, self.slice.model.d_model)).view(-1)

    def add(self, solution: Solution) -> list[SteeringVector]:
        """Certify a solution's vectors and add them to the subspace; returns those that were not stored before."""
        seconds = (time.perf_counter() - self.started) / len(solution.theta)
        first = self.index
        found = [self._certify(theta, solution, first + i, seconds) for i, theta in enumerate(solution.theta)]
        self.last = found[-1]
        return [vector for vector in found if len(self.stored) < vector.index <= self.options.num_vectors]

    def _certify(self, theta: Tensor, solution: Solution, index: int, seconds: float) -> SteeringVector:
        """Orthogonalise θ exactly, round it to float32, add it to the subspace, and compute its certificate.

        A stored vector is kept as it is, even if its last bits differ on this machine.
        """
        if index <= len(self.stored):
            self.subspace.add(self.stored[index - 1].theta)
            return self.stored[index - 1]
        if self.options.limit is not None:
            theta = theta * min(1.0, self.options.limit / float(theta.norm()))
        theta = self.subspace.remove_exact(theta).float().cpu()
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
