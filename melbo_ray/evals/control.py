"""The nulls: evaluations of random directions, and of the mean-difference direction."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals import dose, generalization, generations, greedy, kl, presence
from melbo_ray.evals.catalog import IN_PRESENCE
from melbo_ray.evals.context import Chain, Rows, Study, Vectors
from melbo_ray.evals.kl import at_norm
from melbo_ray.seeds import derive_seed


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write rows of kinds `random` and `contrast` into the tables of the other evaluations.

    `random`: for every vector of the chain, a random direction with the same norm, complement and index is evaluated
    with `kl` and `presence` (share `random`), and 8 evenly spread ones also with the costlier evaluations (`spread`).
    For a chain shorter than 200, `presence` gets further directions up to 200 (`more`, see `more_directions`).
    `contrast`, index 0: the mean-difference direction (`presence.contrast`) at the radius, with all evaluations.
    """
    cheap = (kl.run, presence.run)
    costly = (generalization.run, greedy.run, generations.run, dose.run)
    match share:
        case "random":
            return _all_rows(study, random_directions(study, chain, items), cheap)
        case "spread":
            return _all_rows(study, random_directions(study, chain, items), costly)
        case "more":
            return _all_rows(study, more_directions(study, range(chain.length + 1, IN_PRESENCE + 1)), (presence.run,))
        case _:
            contrast = Vectors("contrast", [0], at_norm(study.once(presence.contrast)[None], study.radius))
            return _all_rows(study, contrast, (*cheap, *costly))


def _all_rows(study: Study, vectors: Vectors, runs: Iterable[Callable[[Study, Vectors], Rows]]) -> Rows:
    rows: Rows = {}
    for run_one in runs if len(vectors) else ():
        for table, part in run_one(study, vectors).items():
            rows.setdefault(table, []).extend(part)
    return rows


def more_directions(study: Study, index: Sequence[int]) -> Vectors:
    """Seeded random directions of norm R, orthogonal to θ₀ and to what the chain avoids."""
    return Vectors("random", index, at_norm(study.beside(_draws(study, index)), study.radius).float())


def random_directions(study: Study, chain: Chain, index: Sequence[int]) -> Vectors:
    """One for each of these vectors: orthogonal to what the vector had to be orthogonal to, of its norm, drawn by seed.

    Uniform on the sphere of the complement that the solver had; where nothing is left of it, zero.
    """
    wanted = chain.vectors.at(index)
    if not len(wanted):
        return Vectors("random", [], wanted.theta)
    # The first rows of the basis span what vector i had to be orthogonal to.
    places = {own: place for place, own in enumerate(chain.vectors.index)}
    taken = torch.tensor([1 + len(chain.avoided) + places[i] for i in wanted.index])
    basis, theta = chain.basis[: int(taken.max())], _draws(study, wanted.index)
    outside = torch.arange(len(basis)) >= taken[:, None]
    for _ in range(2):
        theta = theta - (theta @ basis.T).masked_fill(outside, 0) @ basis
    return Vectors("random", wanted.index, normalize(theta, dim=-1).mul(wanted.theta.norm(dim=-1)[:, None]).float())


def random_direction(
    seed: int, concept: str, index: int, avoid: Float64[Tensor, "taken d_model"]
) -> Float64[Tensor, " d_model"]:
    """The random direction of an index, orthogonal to the orthonormal rows of `avoid`; of no particular norm."""
    draw = _draw(seed, concept, index, avoid.shape[1])
    for _ in range(2):
        draw = draw - avoid.T @ (avoid @ draw)
    return draw


def _draws(study: Study, index: Sequence[int]) -> Float64[Tensor, "n d_model"]:
    """A seeded standard normal draw for each index."""
    size = len(study.base)
    draws = [_draw(study.config.seed, study.concept.name, i, size) for i in index]
    return torch.stack(draws) if draws else torch.zeros(0, size, dtype=torch.float64)


def _draw(seed: int, concept: str, index: int, size: int) -> Float64[Tensor, " d_model"]:
    drawn = torch.Generator().manual_seed(derive_seed(seed, concept, index, "random direction"))
    return torch.randn(size, dtype=torch.float64, generator=drawn)
