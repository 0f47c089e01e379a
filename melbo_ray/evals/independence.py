"""Representational independence of orthogonal vectors.

Wollschläger et al. 2025, "The geometry of refusal in large language models: concept cones and representational
independence": v and w are independent if ablating v at every layer leaves the profile of w, its cosines with the stream
along the layers, as it is, and the reverse. Orthogonal vectors need not be independent.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.convergence import layers_of, with_null
from melbo_ray.model.streams import Streams

_PROMPTS = 3


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `independence`: two rows per vector, for its pair with the base; beside a chain's, those of the null.

    `ablated` names the one of the pair that is projected out of every layer's output from the source on; the profile is
    that of the other: its cosines with the unsteered stream at the last token of the training prompt and of the first
    held-out ones, at the layers after the source. `change` is the rms change of the profile, `profile` its rms without
    ablation. The null is a random direction in the vector's place. The zero vector and the base itself have no pair.
    """
    if vectors.kind in ("base", "unsteered"):
        return {"independence": []}
    rows, base = [], normalize(study.base, dim=0)
    for part in with_null(study, vectors):
        for index, theta in zip(part.index, part.theta, strict=True):
            unit = normalize(theta, dim=0)
            if not theta.norm() > 0:
                continue
            pairs = {"vector": (study.once(_last_tokens), last_tokens(study, unit), base)}
            pairs["base"] = study.once(_last_tokens), study.once(_without_base), unit
            for ablated, (before, after, other) in pairs.items():
                profiles = [normalize(h, dim=-1) @ other for h in (before, after)]
                change, profile = (float(x.square().mean().sqrt()) for x in (profiles[1] - profiles[0], profiles[0]))
                rows.append(study.row(part.kind, index, ablated=ablated, change=change, profile=profile))
    return {"independence": rows}


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
