"""The null of the target: vectors solved for what random directions do, through kl and generalization."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals import generalization, kl
from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search import chain
from melbo_ray.search.subspace import Subspace
from melbo_ray.search.vectors import SteeringVector, row
from melbo_ray.seeds import derive_seed

_COUNT = 8
# Norms of a target's direction up to 64 R are tried, and halved this often between two.
_DOUBLINGS, _HALVINGS = 6, 12


@dataclass(frozen=True)
class Target:
    """What vectors of the null are solved for.

    Attributes:
        theta: (d_model,) float32, a random direction whose z is the target.
        displacement: ‖z(θ) − z(0)‖ / ‖z(θ₀) − z(0)‖: 1, or less where no norm up to 64 R reaches that.
        cos_base: cosine of z(θ) − z(0) and z(θ₀) − z(0): how much of the base's target it shares.
    """

    theta: Float[Tensor, " d_model"]
    displacement: float
    cos_base: float


def run(study: Study, chain: Vectors) -> Rows:
    """Rows of kind `shuffled`, index 1 … 8 (fewer where the chain is shorter or nothing is left), and their targets.

    Vectors like the chain's own (solver, budget, tolerance, `max_norm`; orthogonal to θ₀ and to each other, their
    target's one known solution out of bounds), but each with a target of its own that is as far from z(0) and as surely
    in the model's reach: what a random direction does. Where they are fitted as closely, what separates the chain's KL
    and effect from theirs is owed to what the base does, and not to the solver, to norms, or to the distance asked for.

    `vectors` has their certificates, losses relative to their own targets; `summary` each target's `target_norm`,
    `target_displacement` and `target_cos_base`.
    """
    part = Slice(study.model, [study.tokens(TRAINING)], study.config.source_layer, study.config.target_layer)
    found, summary = [], []
    for target, vector in shuffled_chain(study, part, min(_COUNT, len(chain))):
        norm = float(target.theta.norm())
        figures = {"norm": norm, "displacement": target.displacement, "cos_base": target.cos_base}
        summary += [study.row("shuffled", vector.index, figure=f"target_{k}", value=v) for k, v in figures.items()]
        found.append(vector)
    vectors = Vectors("shuffled", [vector.index for vector in found], torch.stack([vector.theta for vector in found]))
    stored = {"vectors": [_row(study, vector) for vector in found], "summary": summary}
    return stored | kl.run(study, vectors) | generalization.run(study, vectors)


def shuffled_chain(study: Study, part: Slice, count: int) -> Iterator[tuple[Target, SteeringVector]]:
    """Vectors with their targets: a target for each vector, or for each block where the chain has blocks."""
    config, found = study.config, []
    taken = Subspace(len(study.base), min(len(study.base), 1 + count))
    taken.add(study.base)
    # The direction of a target is a dimension less, too.
    while (wanted := min(config.block, count - len(found), len(study.base) - 1 - taken.size)) > 0:
        name = f"{study.concept.name}/shuffled/{len(found) + 1}"
        target = random_target(study, part, taken, derive_seed(config.seed, name, 0, "target"))
        bases = torch.stack([target.theta, study.base, *(vector.theta for vector in found)])
        options = config.model_copy(update={"num_vectors": wanted})
        for vector in chain.chain(part, bases, options, name):
            found.append(dataclasses.replace(vector, index=len(found) + 1))
            yield target, found[-1]
            if vector.norm <= config.min_norm:
                return
            taken.add(vector.theta)


@torch.no_grad()
def random_target(study: Study, part: Slice, taken: Subspace, seed: int) -> Target:
    """A random direction in the complement of `taken`, at the smallest norm at which it moves z as far as θ₀ does.

    By bisection between doublings of R; where none of them moves it as far, 64 R.
    """
    draw = torch.randn(len(study.base), generator=torch.Generator().manual_seed(seed))
    unit = normalize(taken.remove_exact(draw), dim=0).float()

    def z(theta: Tensor) -> Tensor:
        return part.z(theta[None].to(study.model.device), z_from=study.config.z_from)[0].double().cpu()

    unsteered = z(torch.zeros_like(unit))
    aim = z(study.base) - unsteered
    low, high = 0.0, study.radius
    for _ in range(_DOUBLINGS):
        if not (z(unit * high) - unsteered).norm() < aim.norm():
            break
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        near = bool((z(unit * middle) - unsteered).norm() < aim.norm())
        low, high = (middle, high) if near else (low, middle)
    theta = unit * high
    change = z(theta) - unsteered
    return Target(theta, float(change.norm() / aim.norm()), float(change @ aim / change.norm() / aim.norm()))


def _row(study: Study, vector: SteeringVector) -> Row:
    # The rows of an evaluation are the same whoever wrote them: no times.
    return row(study.run_id, "shuffled", vector) | {"seconds": None}
