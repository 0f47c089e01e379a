"""Representational independence of orthogonal vectors.

Wollschläger et al. 2025, "The geometry of refusal in large language models: concept cones and representational
independence": v and w are independent if ablating v at every layer leaves the profile of w, its cosines with the stream
along the layers, as it is, and the reverse. Orthogonal vectors need not be independent.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.catalog import sampled
from melbo_ray.evals.context import TRAINING, Chain, Rows, Study
from melbo_ray.evals.convergence import layers_of, with_null
from melbo_ray.model.streams import Streams

_PROMPTS = 3

Pair = tuple[Float[Tensor, "layers rows d_model"], Float[Tensor, " d_model"]]
"""The stream without one direction of a pair, and the unit vector of the other."""


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `independence`: for each of at most 64 vectors, spread evenly, its pairs with the base and its neighbours.

    `ablated` names the one of a pair that is projected out of every layer's output from the source on: the `vector`, so
    that the profile is the base's; or the `base`, the `previous` or the `next` vector of the sample, so that it is the
    vector's. A profile is the cosines with the unsteered stream at the last token of the training prompt and of the
    first held-out ones, at the layers after the source. `change` is its rms change, `profile` its rms without ablation.
    The null, of kind `random`: a random direction in the place of the vector, or of its neighbour.
    """
    order = [n for n, norm in zip(whole.vectors.index, whole.vectors.norms, strict=True) if norm > 0]
    order = [n for n in sampled(whole.length) if n in order]
    before, rows = study.once(_last_tokens), []
    for n in (n for n in items if n in order):
        for kind, pairs in pairs_of(study, whole, order, n).items():
            for ablated, (after, other) in pairs.items():
                profiles = [normalize(h, dim=-1) @ other for h in (before, after)]
                change, profile = (float(x.square().mean().sqrt()) for x in (profiles[1] - profiles[0], profiles[0]))
                rows.append(study.row(kind, n, ablated=ablated, change=change, profile=profile))
    return {"independence": rows}


def pairs_of(study: Study, whole: Chain, order: Sequence[int], n: int) -> dict[str, dict[str, Pair]]:
    """The pairs of vector n of the sample `order`, by kind and by what is ablated."""
    place = order.index(n)
    beside = {"previous": order[max(place - 1, 0) : place], "next": order[place + 1 : place + 2]}
    parts = {part.kind: part for part in with_null(study, whole.vectors.at([n, *beside["previous"], *beside["next"]]))}

    def unit(kind: str, of: int) -> Float[Tensor, " d_model"]:
        return normalize(parts[kind].at([of]).theta[0], dim=0)

    def without(kind: str, of: int) -> Tensor:
        return whole.once(f"independence/{kind}/{of}", lambda: last_tokens(study, unit(kind, of)))

    return {
        kind: {
            "vector": (without(kind, n), normalize(study.base, dim=0)),
            "base": (study.once(_without_base), unit(kind, n)),
            **{name: (without(kind, other), unit("chain", n)) for name, others in beside.items() for other in others},
        }
        for kind in parts
    }


def streams_of(study: Study) -> Streams:
    """The streams of the training prompt and of the first held-out ones."""
    names = [TRAINING, *list(study.concept.held_out)[:_PROMPTS]]
    return Streams(study.model, [study.tokens(name) for name in names], study.config.source_layer)


def last_tokens(study: Study, ablated: Float[Tensor, " d_model"] | None = None) -> Float[Tensor, "layers rows d_model"]:
    """The unsteered stream at each prompt's last token after every layer above the source."""
    streams = study.once(streams_of)
    h = streams.under(torch.zeros_like(study.base), list(layers_of(study))[1:], ablated)
    return h[:, range(len(streams.lengths)), [length - 1 for length in streams.lengths]]


def _last_tokens(study: Study) -> Tensor:
    return last_tokens(study)


def _without_base(study: Study) -> Tensor:
    return last_tokens(study, normalize(study.base, dim=0))
