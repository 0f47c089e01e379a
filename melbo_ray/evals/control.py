"""The nulls: evaluations of random directions, and of the mean-difference direction."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals import dose, generalization, generations, greedy, kl, presence
from melbo_ray.evals.catalog import FEW, IN_PRESENCE
from melbo_ray.evals.context import Rows, Study, Vectors, evenly
from melbo_ray.evals.kl import at_norm
from melbo_ray.seeds import derive_seed


def run(study: Study, chain: Vectors) -> Rows:
    """Write rows of kinds `random` and `contrast` into the tables of the other evaluations.

    `random`: for every vector of the chain, a random direction with the same norm, complement and index is evaluated
    with `kl` and `presence`, and 8 evenly spread ones also with the costlier evaluations. For a chain shorter than 200,
    `presence` gets further directions up to 200 (`more_directions`).
    `contrast`, index 0: the mean-difference direction (`presence.contrast`) at the radius, with all evaluations.
    """
    drawn = random_directions(study, chain)
    few = drawn.take(evenly(len(drawn), FEW))
    more = more_directions(study, range(max(chain.index) + 1, IN_PRESENCE + 1))
    contrast = Vectors("contrast", [0], at_norm(study.once(presence.contrast)[None], study.radius))
    rows: Rows = {}
    of_all = (kl.run, presence.run)
    for run_one in (*of_all, generalization.run, greedy.run, generations.run, dose.run):
        for vectors in (drawn if run_one in of_all else few, contrast):
            for table, part in run_one(study, vectors).items():
                rows.setdefault(table, []).extend(part)
    rows["presence"] += presence.run(study, more)["presence"]
    return rows


def more_directions(study: Study, index: Sequence[int]) -> Vectors:
    """Seeded random directions beyond those of the chain's vectors: orthogonal to θ₀, of norm R."""
    base = normalize(study.base.double(), dim=0)
    seeds = [derive_seed(study.config.seed, study.concept.name, i, "random direction") for i in index]
    draws = [torch.randn(len(base), dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    theta = torch.stack(draws) if draws else base.new_zeros(0, len(base))
    theta = theta - (theta @ base)[:, None] * base
    return Vectors("random", index, at_norm(theta, study.radius).float())


def random_directions(study: Study, chain: Vectors) -> Vectors:
    """One for each vector of the chain: orthogonal to θ₀ and to the chain before it, of its norm, drawn by seed.

    Uniform on the sphere of the complement that the solver had; where nothing is left of it, zero.
    """
    # The first i rows of the basis span θ₀ and the vectors before vector i, which vector i had to be orthogonal to.
    taken = torch.cat([study.base[None], chain.theta]).double()
    basis = torch.linalg.qr(taken.T).Q.T
    thetas = []
    for place, (index, norm) in enumerate(zip(chain.index, chain.norms, strict=True)):
        draw = random_direction(study.config.seed, study.concept.name, index, basis[: place + 1])
        thetas.append(at_norm(draw[None], norm)[0].float())
    return Vectors("random", chain.index, torch.stack(thetas))


def random_direction(
    seed: int, concept: str, index: int, avoid: Float64[Tensor, "taken d_model"]
) -> Float64[Tensor, " d_model"]:
    """The random direction of an index, orthogonal to the orthonormal rows of `avoid`; of no particular norm."""
    drawn = torch.Generator().manual_seed(derive_seed(seed, concept, index, "random direction"))
    draw = torch.randn(avoid.shape[1], dtype=torch.float64, generator=drawn)
    for _ in range(2):
        draw = draw - avoid.T @ (avoid @ draw)
    return draw
