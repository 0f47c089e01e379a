"""KL divergences of the next-token distribution from those of the base and of the unsteered model."""

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.model.steering import kl

TOP = 10


def run(study: Study, vectors: Vectors) -> Rows:
    """Evaluate each vector at the last token of the training prompt, at its own norm and rescaled to the radius."""
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
    best = int(study.base_log_probs.argmax())
    columns = []
    for logits in study.prompt.logits(thetas):
        log_p = logits[0].double().log_softmax(-1)
        top = log_p.topk(min(TOP, len(log_p)))
        columns.append(
            {
                **divergences(study, log_p),
                "top_tokens": [study.model.tokenizer.decode([token]) for token in top.indices.tolist()],
                "top_probs": top.values.exp().tolist(),
                "top1_agrees": int(top.indices[0]) == best,
            }
        )
    return columns


def divergences(study: Study, log_p: Float[Tensor, " vocab"]) -> dict[str, float]:
    """KL(P‖P_base), KL(P_base‖P) and KL(P‖P_unsteered), nats, computed in float64."""
    base, unsteered = study.base_log_probs, study.unsteered_log_probs
    return {
        "kl_from_base": float(kl(log_p, base)),
        "kl_to_base": float(kl(base, log_p)),
        "kl_from_unsteered": float(kl(log_p, unsteered)),
    }


def at_norm(thetas: Float[Tensor, "n d_model"], norm: float) -> Float[Tensor, "n d_model"]:
    """Rescale every vector to the given norm; the zero vector stays zero."""
    return torch.nn.functional.normalize(thetas, dim=-1) * norm
