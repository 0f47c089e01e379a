"""The null of the target: vectors optimised for the effects of random directions, evaluated like the chain."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals import generalization, kl
from melbo_ray.evals.catalog import SHUFFLED
from melbo_ray.evals.context import TRAINING, Chain, Row, Rows, Study, Vectors
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search import chain
from melbo_ray.search.subspace import Subspace
from melbo_ray.search.vectors import SteeringVector, row
from melbo_ray.seeds import derive_seed

# The norm of a target's direction is doubled up to 64 R, then bisected.
_DOUBLINGS, _HALVINGS = 6, 12


@dataclass(frozen=True)
class Target:
    """A target of the null.

    Attributes:
        theta: a random vector whose z is the target, (d_model,) float32.
        displacement: ‖z(θ) − z(0)‖ / ‖z(θ₀) − z(0)‖; 1, or less if no norm up to 64 R reaches that.
        cos_base: cosine of z(θ) − z(0) and z(θ₀) − z(0), the similarity to the base's target.
    """

    theta: Float[Tensor, " d_model"]
    displacement: float
    cos_base: float


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Find and evaluate vectors of kind `shuffled`, index 1 … 8 (fewer if the chain or the complement is smaller).

    They are found like the chain's vectors (solver, budget, tolerance, `max_norm`; orthogonal to θ₀, to what the chain
    avoids, to each other and to the known solution of their target), but for another target: the effect of a random
    direction, equally far from z(0) and equally reachable for the model. If they fit their targets as closely, a
    difference of the chain's KL and effect from theirs is due to the base's effect, and not to the solver, the norms,
    or the distance of the target.

    Only the indices `items` are returned. Those before them are read from the run, and found again where it lacks them;
    so is a whole block of which a vector has failed, as its vectors depend on each other.
    `vectors` holds their certificates, with losses relative to their own targets; `summary` holds each target's
    `target_norm`, `target_displacement` and `target_cos_base`.
    """
    found, summary = [], []
    earlier, last = _before(chain, items, study.config.block)
    for target, vector in shuffled_chain(study, study.once(_slice), last, earlier, chain.avoided):
        if vector.index in items:
            norm = float(target.theta.norm())
            figures = {"norm": norm, "displacement": target.displacement, "cos_base": target.cos_base}
            summary += [study.row("shuffled", vector.index, figure=f"target_{k}", value=v) for k, v in figures.items()]
            found.append(vector)
    if not found:
        return {}
    vectors = Vectors("shuffled", [vector.index for vector in found], torch.stack([vector.theta for vector in found]))
    stored = {"vectors": [_row(study, vector) for vector in found], "summary": summary}
    return stored | kl.run(study, vectors) | generalization.run(study, vectors)


def _slice(study: Study) -> Slice:
    return Slice(study.model, [study.tokens(TRAINING)], study.config.source_layer, study.config.target_layer)


def _before(chain: Chain, items: Sequence[int], block: int) -> tuple[list[Float[Tensor, " d_model"]], int]:
    """The stored vectors that a search for `items` goes on from, and the index at which their last block ends."""
    first, last = min(items), max(items)
    begin, end = (first - 1) // block * block, -(-last // block) * block
    own = (pc.field("evaluation") == "shuffled") & (pc.field("index") > begin) & (pc.field("index") <= end)
    failed = len(chain.stored("failures").filter(own)) > 0
    return _stored(chain, begin + 1 if failed else first), max(last, min(end, SHUFFLED, chain.length))


def _stored(chain: Chain, before: int) -> list[Float[Tensor, " d_model"]]:
    """The vectors of kind `shuffled` that the run holds, from index 1 on without a gap, up to `before`."""
    rows = chain.stored("vectors").filter((pc.field("kind") == "shuffled") & (pc.field("index") < before))
    vectors = dict(zip(rows["index"].to_pylist(), rows["vector"].to_pylist(), strict=True))
    found = itertools.takewhile(lambda index: index in vectors, range(1, before))
    return [torch.tensor(vectors[index]) for index in found]


def shuffled_chain(
    study: Study,
    slice_: Slice,
    count: int,
    earlier: Sequence[Float[Tensor, " d_model"]] = (),
    avoided: Sequence[Float[Tensor, " d_model"]] = (),
) -> Iterator[tuple[Target, SteeringVector]]:
    """Yields the vectors after the `earlier` ones, up to index `count`, with their targets; `avoided` as of `Chain`.

    There is one target per vector, or per block of the option `block`. What is found does not depend on whether the
    earlier vectors were found in the same call, if they are whole blocks.
    """
    config, found = study.config, list(earlier)
    taken = Subspace(len(study.base), min(len(study.base), 1 + len(avoided) + max(count, SHUFFLED)))
    if found and float(found[-1].norm()) <= config.min_norm:
        return
    for theta in (study.base, *avoided, *found):
        taken.add(theta)
    # The direction of a target takes one dimension of the complement, too.
    while (wanted := min(config.block, count - len(found), len(study.base) - 1 - taken.size)) > 0:
        name = f"{study.concept.name}/shuffled/{len(found) + 1}"
        target = random_target(study, slice_, taken, derive_seed(config.seed, name, 0, "target"))
        options = config.at(study.radius).model_copy(update={"num_vectors": wanted})
        rows = torch.stack([target.theta, study.base, *avoided, *found])
        for vector in chain.chain(slice_, rows, options, name):
            found.append(vector.theta)
            yield target, dataclasses.replace(vector, index=len(found))
            if vector.norm <= config.min_norm:
                return
            taken.add(vector.theta)


@torch.no_grad()
def random_target(study: Study, slice_: Slice, taken: Subspace, seed: int) -> Target:
    """A random direction in the complement of `taken`, at the smallest norm that displaces z as far as θ₀ does.

    The norm is bisected between doublings of R; if none of them suffices, it is 64 R.
    """
    draw = torch.randn(len(study.base), generator=torch.Generator().manual_seed(seed))
    unit = normalize(taken.remove_exact(draw), dim=0).float()

    def z(theta: Tensor) -> Tensor:
        return slice_.z(theta[None].to(study.model.device), z_from=study.config.z_from)[0].double().cpu()

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
    # The rows of an evaluation must not depend on the worker, so they contain no times.
    return row(study.run_id, "shuffled", vector) | {"seconds": None}
