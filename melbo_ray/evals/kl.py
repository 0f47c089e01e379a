"""KL divergences of the next-token distribution from those of the base and of the unsteered model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.model.steering import kl

TOP = 10
KLS = ("kl_from_base", "kl_to_base", "kl_from_unsteered")


def run(study: Study, vectors: Vectors) -> Rows:
    """Evaluate each vector at the last token of the training prompt, at its own norm and rescaled to the radius."""
    study = study.rounded
    scales = {"own": vectors.theta, "radius": at_norm(vectors.theta, study.radius)}
    rows = []
    for scale, thetas in scales.items():
        norms = thetas.norm(dim=-1).tolist()
        for index, norm, columns in zip(vectors.index, norms, next_token(study, thetas), strict=True):
            # The zero vector has no direction to rescale.
            if scale == "own" or norm > 0:
                keys = {"prompt_id": TRAINING, "scale": scale, "norm": norm}
                rows.append(study.row(vectors.kind, index, **keys, **columns))
    return {"kl": rows}


def next_token(study: Study, thetas: Float[Tensor, "n d_model"]) -> list[Row]:
    """For each vector, the columns of `kl` computed from its next-token distribution on the training prompt."""
    rows = []
    for logits in study.prompt.logits(thetas):
        log_p = logits[0].double().log_softmax(-1)
        top = log_p.topk(min(TOP, len(log_p)))
        agrees = top.indices[:1] == study.base_log_probs.argmax()
        rows.append(torch.cat([distances(study, log_p), agrees, top.values.exp(), top.indices]))
    columns = []
    for row in fetched(rows):
        kls, (agrees, *rest) = row[: len(KLS)], row[len(KLS) :]
        probs, tokens = rest[: len(rest) // 2], map(int, rest[len(rest) // 2 :])
        columns.append(
            {
                **dict(zip(KLS, kls, strict=True)),
                "top_tokens": [study.model.tokenizer.decode([token]) for token in tokens],
                "top_probs": probs,
                "top1_agrees": bool(agrees),
            }
        )
    return columns


def distances(study: Study, log_p: Float[Tensor, " vocab"]) -> Float[Tensor, " 3"]:
    """KL(P‖P_base), KL(P_base‖P) and KL(P‖P_unsteered), nats, in float64, on the device of `log_p`."""
    base, unsteered = study.base_log_probs, study.unsteered_log_probs
    return torch.stack([kl(log_p, base), kl(base, log_p), kl(log_p, unsteered)])


def named(kls: Sequence[Float[Tensor, " 3"]]) -> list[dict[str, float]]:
    """The columns of `distances` of several vectors, fetched at once."""
    return [dict(zip(KLS, row, strict=True)) for row in fetched(kls)]


def divergences(study: Study, log_p: Float[Tensor, " vocab"]) -> dict[str, float]:
    """The columns of `distances` of one vector."""
    return named([distances(study, log_p)])[0]


def fetched(rows: Sequence[Tensor]) -> list[Any]:
    """The values of tensors of one shape, in one transfer: the host waits once, after all that it has asked for."""
    return torch.stack(list(rows)).tolist() if rows else []


def at_norm(thetas: Float[Tensor, "n d_model"], norm: float) -> Float[Tensor, "n d_model"]:
    """Rescale every vector to the given norm; the zero vector stays zero."""
    return torch.nn.functional.normalize(thetas, dim=-1) * norm
