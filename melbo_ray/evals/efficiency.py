"""Efficiency, stability and significance of a vector as a solution, and its share in the model's own activations.

Soligo et al. 2026, "Emergent misalignment is easy, narrow misalignment is hard": a solution that a model prefers has a
lower loss at equal norm, loses less under orthogonal noise, and changes predictions on ordinary text more. The natural
share is Mack's multiplicity argument (2024, "Deep causal transcoding"): a feature that the model uses is a large part
of some of its activations.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.kl import at_norm
from melbo_ray.evals.linear import real_losses
from melbo_ray.evals.presence import text_sets
from melbo_ray.model.steering import Prompts, encode, kl
from melbo_ray.seeds import derive_seed

RADII, NOISE = (1, 2, 4), (0.5, 1.0)
"""Norms in units of R; noise in units of the vector's own norm."""
_TEXTS, _LENGTH, _BEGUN = 4, 24, 2


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `efficiency`: a row per vector, and beside a chain's one of a random direction of its norm.

    `loss_at_1r`, `_2r`, `_4r`: relative loss at 1, 2, 4 times R; `loss_own` at the vector's own norm. `loss_noise_05`,
    `_10`: at the own norm plus a random direction orthogonal to it, of 0.5 and 1 times its norm. `kl_neutral`: mean KL
    from unsteered over the tokens of neutral texts at norm R, nats. `natural_share`: the maximum of (x·v)² / ‖x‖² over
    the unsteered stream's tokens after the source layer, v the unit vector, x the stream on concept and neutral texts,
    sinks dropped. The zero vector has losses alone.
    """
    rows = []
    for part in with_null(study, vectors):
        of_norms = {f"loss_at_{r}r": real_losses(study, at_norm(part.theta, r * study.radius)) for r in RADII}
        noise = _noise(study, part)
        of_norms |= {"loss_own": real_losses(study, part.theta)}
        of_norms |= {
            f"loss_noise_{round(10 * size):02d}": real_losses(study, part.theta + size * noise) for size in NOISE
        }
        for place, (index, norm) in enumerate(zip(part.index, part.norms, strict=True)):
            columns: Row = {name: values[place] for name, values in of_norms.items()}
            columns |= _on_texts(study, part.theta[place]) if norm > 0 else {"kl_neutral": None, "natural_share": None}
            rows.append(study.row(part.kind, index, norm=norm, **columns))
    return {"efficiency": rows}


def _noise(study: Study, vectors: Vectors) -> Float[Tensor, "n d_model"]:
    """For each vector a random one of its norm, orthogonal to it."""
    rows = []
    for index, theta in zip(vectors.index, vectors.theta.double(), strict=True):
        seed = derive_seed(study.config.seed, study.concept.name, index, f"efficiency/{vectors.kind}")
        draw = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        unit = normalize(theta, dim=0)
        rows.append(normalize(draw - (draw @ unit) * unit, dim=0) * theta.norm())
    return torch.stack(rows).float()


def _on_texts(study: Study, theta: Float[Tensor, " d_model"]) -> Row:
    prompts, plain = study.once(neutral)
    steered = prompts.under(at_norm(theta[None], study.radius)[0])
    divergence = [kl(logits.log_softmax(-1), before) for logits, before in zip(steered, plain, strict=True)]
    shares = (study.once(natural) @ normalize(theta, dim=0)).square()
    return {"kl_neutral": float(torch.cat(divergence).mean()), "natural_share": float(shares.max())}


def neutral(study: Study) -> tuple[Prompts, list[Float[Tensor, "_kept vocab"]]]:
    """The first neutral texts, cut to 24 tokens, and the unsteered log-probabilities along them."""
    texts = study.concept.neutral_texts or study.concept.neutral
    tokens = [encode(study.model, text)[:_LENGTH] for text in texts[:_TEXTS]]
    begun, rest = [ids[:_BEGUN] for ids in tokens], [[ids[_BEGUN:]] for ids in tokens]
    prompts = Prompts(study.model, begun, study.config.source_layer, rest)
    return prompts, [logits.log_softmax(-1) for logits in prompts.under(torch.zeros_like(study.base))]


def natural(study: Study) -> Float[Tensor, "tokens d_model"]:
    """The unit activations of the text sets of `presence`, without sinks."""
    sets = [part.activations("dropped") for pair in study.once(text_sets).values() for part in pair]
    return normalize(torch.cat(sets), dim=-1)
