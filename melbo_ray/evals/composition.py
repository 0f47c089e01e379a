"""The effect of combined vectors: means of the first k or of k random vectors, added, or ablated under the base."""

import statistics

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.control import random_directions
from melbo_ray.evals.dose import measure_all
from melbo_ray.evals.generations import write
from melbo_ray.evals.kl import at_norm
from melbo_ray.seeds import derive_seed

_SIZES = (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_RANDOM_SUBSETS = 2


def run(study: Study, chain: Vectors) -> Rows:
    """Evaluate the mean of the first k vectors (rule `first`) and of k seeded random ones (`random`), k = 2, 3, 5, ….

    `scale` is `own` (the mean itself), `typical` (rescaled to the chain's median norm), or `ablated` (the base steers,
    and the mean's direction is projected out of the stream after the source layer). `norm` is that of the added vector,
    for `ablated` the base. `index` counts the rows. One text is sampled per row.

    The null has kind `random`: the row of the same index is the mean of the random directions (`control`) that
    correspond to the same members, with their norms, and has no text.
    """
    subsets = _subsets(study, chain)
    if not subsets:
        return {"composition": []}
    rows = []
    for vectors in (chain, random_directions(study, chain)):
        rows += _rows(study, vectors, subsets)
    return {"composition": rows}


def _rows(study: Study, vectors: Vectors, subsets: list[tuple[str, list[int]]]) -> list[Row]:
    means = torch.stack([vectors.theta[places].mean(0) for _, places in subsets])
    typical = at_norm(means, statistics.median(vectors.norms))
    rows = []
    for scale, thetas in {"own": means, "typical": typical, "ablated": _ablated(study, means)}.items():
        numbers = range(len(rows), len(rows) + len(subsets))
        norms = [float(study.base.norm())] * len(subsets) if scale == "ablated" else thetas.norm(dim=-1).tolist()
        texts = [None] * len(subsets)
        if vectors.kind == "chain":
            texts = _texts(study, numbers, scale, means if scale == "ablated" else thetas)
        for number, (rule, places), norm, columns, text in zip(
            numbers, subsets, norms, measure_all(study, thetas), texts, strict=True
        ):
            members = [vectors.index[place] for place in places]
            keys = {"k": len(places), "members": members, "rule": rule, "scale": scale, "norm": norm, "text": text}
            rows.append(study.row(vectors.kind, number, **keys, **columns))
    return rows


def _texts(study: Study, numbers: range, scale: str, thetas: Float[Tensor, "n d_model"]) -> list[str | None]:
    """A text under each θ, or under the base with each θ's direction ablated."""
    keys = [{"index": number, "prompt_id": TRAINING, "scale": scale} for number in numbers]
    if scale == "ablated":
        written = write(study, "composition", keys, [study.base] * len(keys), list(at_norm(thetas, 1.0)))
    else:
        written = write(study, "composition", keys, list(thetas))
    return [row["text"] for row in written]


def _subsets(study: Study, chain: Vectors) -> list[tuple[str, list[int]]]:
    """The subsets as (rule, positions in the chain)."""
    subsets = []
    for k in (size for size in _SIZES if size <= len(chain)):
        subsets.append(("first", list(range(k))))
        for draw in range(_RANDOM_SUBSETS if k < len(chain) else 0):
            seed = derive_seed(study.config.seed, study.concept.name, draw, f"composition/{k}")
            order = torch.randperm(len(chain), generator=torch.Generator().manual_seed(seed))
            subsets.append(("random", sorted(order[:k].tolist())))
    return subsets


def _ablated(study: Study, means: Float[Tensor, "n d_model"]) -> Float[Tensor, "n seq d_model"]:
    """The vector to add at each position so that the base steers and the stream has no component along each mean."""
    units = at_norm(means, 1.0)
    steered = study.scored.h_source[0].float().cpu() + study.base
    return study.base - (steered @ units.T).T[..., None] * units[:, None, :]
