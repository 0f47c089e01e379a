"""Convergence: from which layer on orthogonal vectors displace the residual stream in one direction.

The displacement at a layer is what the vector changes there, h(θ) − h(0). Cosines with the base's displacement, and the
displacements themselves, from which the participation ratio and the centred kernel alignment over n follow
(`report.spread`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.control import more_directions
from melbo_ray.model.streams import Streams


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `convergence`: a row for every layer from the source to the last, at each of three `position`s.

    `last` is the last token of the training prompt, `mean` the mean displacement over the positions of z (`z_from` on),
    `first` the first position, often an attention sink's. `token_cosines` has a row for every layer, with the cosine at
    each token of the prompt. `cos_base` is null where nothing is displaced. Beside every vector of a chain stands the
    null, of kind `random`: a random direction of its norm, orthogonal to the base.
    """
    rows: Rows = {"convergence": [], "token_cosines": []}
    base = study.once(_base_everywhere)
    of_positions = _at_positions(study, base)
    for part in with_null(study, vectors):
        for index, theta in zip(part.index, part.theta, strict=True):
            h, keys = _everywhere(study, theta), (part.kind, index)
            for position, moved in _at_positions(study, h).items():
                rows["convergence"] += _rows(study, keys, position, moved, of_positions[position])
            for layer, *pair in zip(layers_of(study), h, base, strict=True):
                rows["token_cosines"].append(study.row(*keys, layer=layer, cos_base=_cosines(*pair)))
    return rows


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


def unsteered(study: Study) -> Float[Tensor, "layers seq d_model"]:
    """The unsteered stream of every layer of `layers_of`."""
    return study.once(streams_of).under(torch.zeros_like(study.base), layers_of(study))[:, 0]


def _everywhere(study: Study, theta: Float[Tensor, " d_model"]) -> Float[Tensor, "layers seq d_model"]:
    """The displacement of every layer of `layers_of`."""
    return study.once(streams_of).under(theta, layers_of(study))[:, 0] - study.once(unsteered)


def _base_everywhere(study: Study) -> Float[Tensor, "layers seq d_model"]:
    return _everywhere(study, study.base)


def _at_positions(study: Study, h: Float[Tensor, "layers seq d_model"]) -> dict[str, Float[Tensor, "layers d_model"]]:
    return {"last": h[:, -1], "mean": h[:, study.config.z_from :].mean(1), "first": h[:, 0]}


def _cosines(one: Float[Tensor, "n d_model"], other: Float[Tensor, "n d_model"]) -> list[float | None]:
    """The cosine of each pair; None where a vector is zero."""
    cosines = cosine_similarity(one, other, dim=-1)
    defined = (one.norm(dim=-1) > 0) & (other.norm(dim=-1) > 0)
    return [value if there else None for value, there in zip(cosines.tolist(), defined.tolist(), strict=True)]


def _rows(
    study: Study,
    keys: tuple[str, int],
    position: str,
    moved: Float[Tensor, "layers d_model"],
    base: Float[Tensor, "layers d_model"],
) -> list[Row]:
    rows = []
    for layer, h, cosine in zip(layers_of(study), moved, _cosines(moved, base), strict=True):
        columns = {
            "layer": layer,
            "position": position,
            "cos_base": cosine,
            "displacement": float(h.norm()),
            "vector": None if position == "first" else h.tolist(),
        }
        rows.append(study.row(*keys, **columns))
    return rows
