"""Frozen attention: the share of a vector's effect that is left when attention looks where it looks unsteered.

Attention patterns are those of the unsteered run at every layer, values and MLPs those of the steered one (the QK and
OV circuits of Elhage et al. 2021, "A mathematical framework for transformer circuits"). What is lost acts by moving
attention, what is left by values and MLPs.
"""

import contextlib

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.kl import divergences
from melbo_ray.model.architecture import stream
from melbo_ray.model.attention import Patterns, frozen, keeping
from melbo_ray.model.hooks import logits_at, steering
from melbo_ray.model.steering import PASS_TOKENS

LEFT_OUT = "some layers of this model do not call transformers' attention interface, and would not be frozen"
_COLUMNS = ("kl_from_base", "kl_from_unsteered", "moved", "cos")


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `frozen`: a row per vector with its attention `free` and one with it `frozen`.

    `moved` is ‖z(θ) − z(0)‖ (residual-stream units), `cos` its cosine with the base's free displacement, null where
    nothing is moved. Of a model whose attention cannot be frozen, the rows have the reason in `left_out` and no
    figures. The null, of kind `random`: a random direction of each vector's norm.
    """
    patterns = study.once(unsteered_patterns)
    rows = []
    for part in with_null(study, vectors):
        columns: dict[str, list[Row]] = {}
        if patterns:
            columns = {name: _effects(study, part.theta, name == "frozen") for name in ("free", "frozen")}
        for name in ("free", "frozen"):
            for place, (index, norm) in enumerate(zip(part.index, part.norms, strict=True)):
                found = columns[name][place] if columns else dict.fromkeys(_COLUMNS)
                reason = None if columns else LEFT_OUT
                rows.append(study.row(part.kind, index, attention=name, norm=norm, left_out=reason, **found))
    return {"frozen": rows}


def unsteered_patterns(study: Study) -> Patterns:
    """The patterns on the training prompt, unsteered; empty unless every layer above the source has some to freeze."""
    kept: Patterns = {}
    zero = torch.zeros_like(study.base)[None]
    with keeping(kept):
        _read(study, zero)
    above = study.model.layers[study.config.source_layer + 1 :]
    every = all(any(module in kept for module in layer.modules()) for layer in above)
    # A family may hand something to attention that is not four-dimensional.
    return kept if every and all(part.ndim == 4 for parts in kept.values() for part in parts) else {}


def _effects(study: Study, thetas: Float[Tensor, "n d_model"], freeze: bool) -> list[Row]:
    unsteered, base = study.once(_ends)
    size = max(1, PASS_TOKENS // len(study.tokens(TRAINING)))
    rows = []
    for part in thetas.split(size):
        with frozen(study.once(unsteered_patterns)) if freeze else contextlib.nullcontext():
            log_p, z = _read(study, part)
        for scores, moved in zip(log_p, z - unsteered, strict=True):
            found = divergences(study, scores.to(study.base_log_probs.device))
            cos = float(cosine_similarity(moved, base - unsteered, dim=0)) if moved.norm() > 0 else None
            kls = {name: found[name] for name in ("kl_from_base", "kl_from_unsteered")}
            rows.append(kls | {"moved": float(moved.norm()), "cos": cos})
    return rows


def _ends(study: Study) -> Float[Tensor, "2 d_model"]:
    """The target layer's z(0) and z(θ₀)."""
    return _read(study, torch.stack([torch.zeros_like(study.base), study.base]))[1]


@torch.no_grad()
def _read(study: Study, thetas: Float[Tensor, "n d_model"]) -> tuple[Tensor, Float[Tensor, "n d_model"]]:
    """Log-probabilities of the next token after the training prompt, float64, and z, on the CPU, under each θ."""
    model, config, tokens = study.model, study.config, study.tokens(TRAINING)
    found: list[Tensor] = []
    handle = model.layers[config.target_layer].register_forward_hook(
        lambda _layer, _args, output: found.append(stream(output)[:, config.z_from :].float().mean(1).cpu())
    )
    last = torch.arange(len(thetas)), torch.full((len(thetas),), len(tokens) - 1)
    try:
        with steering(model, config.source_layer, thetas), logits_at(model, last):
            ids = tokens.expand(len(thetas), -1).to(model.device)
            logits = model.network(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits.cpu().double().log_softmax(-1), found[0]
