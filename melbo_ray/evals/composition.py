"""The effect of combined vectors: means of the first k or of k random vectors, added, or ablated under the base."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.catalog import COMPOSED, RANDOM_SUBSETS, SUBSETS
from melbo_ray.evals.context import TRAINING, Chain, Row, Rows, Study, Vectors
from melbo_ray.evals.control import random_directions
from melbo_ray.evals.dose import measure_all
from melbo_ray.evals.generations import write
from melbo_ray.evals.kl import at_norm
from melbo_ray.seeds import derive_seed

# Random directions drawn at once.
_DRAWN = 64


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Evaluate the mean of the first k vectors (rule `first`) and of k seeded random ones (`random`), k = 2, 3, 5, ….

    `scale` is `own` (the mean itself), `typical` (rescaled to the chain's median norm), or `ablated` (the base steers,
    and the mean's direction is projected out of the stream after the source layer). `norm` is that of the added vector,
    for `ablated` the base. `index` counts the rows, first by scale, then by subset; `items` are those wanted. One text
    is sampled per row.

    The null has kind `random`: the row of the same index is the mean of the random directions (`control`) that
    correspond to the same members, with their norms, and has no text.
    """
    study = study.rounded
    subsets, rows = _subsets(study, chain.vectors), []
    for place, scale in enumerate(COMPOSED):
        first = place * len(subsets)
        wanted = {number: subsets[number - first] for number in items if 0 <= number - first < len(subsets)}
        if wanted:
            drawn = _random(study, chain, sorted({index for _, members in wanted.values() for index in members}))
            rows += _rows(study, chain, chain.vectors, scale, wanted) + _rows(study, chain, drawn, scale, wanted)
    return {"composition": rows}


def _random(study: Study, chain: Chain, index: Sequence[int]) -> Vectors:
    parts = [random_directions(study, chain, index[i : i + _DRAWN]) for i in range(0, len(index), _DRAWN)]
    return Vectors("random", index, torch.cat([part.theta for part in parts]))


def _rows(
    study: Study, chain: Chain, vectors: Vectors, scale: str, subsets: dict[int, tuple[str, list[int]]]
) -> list[Row]:
    """The rows of one kind and scale; `subsets` are (rule, members) by the rows' numbers."""
    means = torch.stack([vectors.at(members).theta.mean(0) for _, members in subsets.values()])
    thetas = means
    if scale == "typical":
        thetas = at_norm(means, chain.median_norm)
    elif scale == "ablated":
        thetas = _ablated(study, means)
    norms = [study.radius] * len(subsets) if scale == "ablated" else thetas.norm(dim=-1).tolist()
    texts: list[str | None] = [None] * len(subsets)
    if vectors.kind == "chain":
        texts = _texts(study, subsets, scale, means if scale == "ablated" else thetas)
    rows = []
    for (number, (rule, members)), norm, columns, text in zip(
        subsets.items(), norms, measure_all(study, thetas), texts, strict=True
    ):
        keys = {"k": len(members), "members": members, "rule": rule, "scale": scale, "norm": norm, "text": text}
        rows.append(study.row(vectors.kind, number, **keys, **columns))
    return rows


def _texts(study: Study, numbers: Iterable[int], scale: str, thetas: Float[Tensor, "n d_model"]) -> list[str | None]:
    """A text under each θ, or under the base with each θ's direction ablated."""
    keys = [{"index": number, "prompt_id": TRAINING, "scale": scale} for number in numbers]
    if scale == "ablated":
        written = write(study, "composition", keys, [study.base] * len(keys), list(at_norm(thetas, 1.0)))
    else:
        written = write(study, "composition", keys, list(thetas))
    return [row["text"] for row in written]


def _subsets(study: Study, chain: Vectors) -> list[tuple[str, list[int]]]:
    """The subsets as (rule, indices of the members)."""
    subsets = []
    for k in (size for size in SUBSETS if size <= len(chain)):
        subsets.append(("first", list(chain.index[:k])))
        for draw in range(RANDOM_SUBSETS if k < len(chain) else 0):
            seed = derive_seed(study.config.seed, study.concept.name, draw, f"composition/{k}")
            order = torch.randperm(len(chain), generator=torch.Generator().manual_seed(seed))
            subsets.append(("random", [chain.index[place] for place in sorted(order[:k].tolist())]))
    return subsets


def _ablated(study: Study, means: Float[Tensor, "n d_model"]) -> Float[Tensor, "n seq d_model"]:
    """The vector to add at each position so that the base steers and the stream has no component along each mean."""
    units = at_norm(means, 1.0)
    steered = study.scored.h_source[0].float().cpu() + study.base
    return study.base - (steered @ units.T).T[..., None] * units[:, None, :]
