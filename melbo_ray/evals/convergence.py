"""Convergence: from which layer on orthogonal vectors displace the residual stream in one direction.

The displacement at a layer is what the vector changes there, h(θ) − h(0). Cosines with the base's displacement, and the
displacements themselves, from which the participation ratio and the centred kernel alignment over n follow
(`report.spread`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.control import more_directions
from melbo_ray.model.streams import Streams


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `convergence`: a row for every layer from the source to the last, at each of three `position`s.

    `last` is the last token of the training prompt, `mean` the mean displacement over the positions of z (`z_from` on),
    `first` the first position, often an attention sink's. `cos_base` is null where nothing is displaced. Beside every
    vector of a chain stands the null, of kind `random`: a random direction of its norm, orthogonal to the base.
    """
    rows = []
    for part in with_null(study, vectors):
        for index, theta in zip(part.index, part.theta, strict=True):
            rows += _rows(study, part.kind, index, displacements(study, theta))
    return {"convergence": rows}


def with_null(study: Study, vectors: Vectors) -> list[Vectors]:
    """The vectors; for a chain also seeded random directions of their indices and norms (`more_directions`)."""
    if vectors.kind != "chain":
        return [vectors]
    drawn = more_directions(study, vectors.index).theta
    scale = torch.tensor(vectors.norms) / study.radius
    return [vectors, Vectors("random", vectors.index, drawn * scale[:, None])]


def layers_of(study: Study) -> range:
    """The layers from the source to the last."""
    return range(study.config.source_layer, len(study.model.layers))


def streams_of(study: Study) -> Streams:
    """The streams of the training prompt."""
    return Streams(study.model, [study.tokens(TRAINING)], study.config.source_layer, study.prompt.way == "whole")


def displacements(study: Study, theta: Float[Tensor, " d_model"]) -> dict[str, Float[Tensor, "layers d_model"]]:
    """The displacement of every layer of `layers_of`, by position."""
    h = study.once(streams_of).under(theta, layers_of(study))[:, 0] - study.once(unsteered)
    return {"last": h[:, -1], "mean": h[:, study.config.z_from :].mean(1), "first": h[:, 0]}


def unsteered(study: Study) -> Float[Tensor, "layers seq d_model"]:
    """The unsteered stream of every layer of `layers_of`."""
    return study.once(streams_of).under(torch.zeros_like(study.base), layers_of(study))[:, 0]


def of_base(study: Study) -> dict[str, Float[Tensor, "layers d_model"]]:
    """The base's displacements."""
    return displacements(study, study.base)


def _rows(study: Study, kind: str, index: int, moved: dict[str, Float[Tensor, "layers d_model"]]) -> list[Row]:
    rows = []
    for position, h in moved.items():
        base = study.once(of_base)[position]
        cosines = (normalize(h, dim=-1) * normalize(base, dim=-1)).sum(-1)
        defined = (h.norm(dim=-1) > 0) & (base.norm(dim=-1) > 0)
        for place, layer in enumerate(layers_of(study)):
            columns = {
                "layer": layer,
                "position": position,
                "cos_base": float(cosines[place]) if defined[place] else None,
                "displacement": float(h[place].norm()),
                "vector": None if position == "first" else h[place].tolist(),
            }
            rows.append(study.row(kind, index, **columns))
    return rows
