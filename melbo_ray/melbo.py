"""The base vector θ₀: MELBO candidates, the contrast of concept and neutral prompts, or a file of vectors.

Source: Mack and Turner (2024), "Mechanistically eliciting latent behaviors in language models": steering vectors of a
fixed norm that change the target layer's activations the most.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.candidates import Candidate, judge, rank
from melbo_ray.concepts import Concept
from melbo_ray.config import Config, UserError
from melbo_ray.model import LanguageModel
from melbo_ray.ortho import derive_seed
from melbo_ray.residual import Slice
from melbo_ray.steer import Prompts

_STEP = 0.05
_MOMENTUM = 0.7
# A given concept may be written by no candidate yet: the ascent then goes on, at most this many times as long.
_ROUNDS = 4


def base_vector(
    model: LanguageModel, concept: Concept, config: Config
) -> tuple[Float[Tensor, " d_model"], list[Candidate]]:
    """θ₀ as `config.base` asks for it, of norm R, and all the candidates it was chosen from.

    `config.base_index` takes one; without it what the candidates write decides (`candidates`).

    Raises:
        UserError: an index out of range, a file that cannot be read or does not fit, or a direction of norm 0.
    """
    slice = Slice(
        model, [model.tokenize(concept.prompt, config.system_prompt)], config.source_layer, config.target_layer
    )
    if config.base == "melbo":
        found, unsteered_shows = _until_one_shows(slice, concept, config)
    else:
        contrasting = config.base == "contrast"
        thetas = contrast(model, concept, config)[None] if contrasting else read_vectors(config.base, model.d_model)
        found, unsteered_shows = _judged(slice, concept, config, thetas)
    if config.base_index is not None and config.base_index >= len(found):
        raise UserError(f"base index {config.base_index} is out of range: there are {len(found)} candidates, from 0")
    ranked = rank(found, config.base_index, unsteered_shows)
    return next(candidate.theta for candidate in ranked if candidate.taken), ranked


def _until_one_shows(slice: Slice, concept: Concept, config: Config) -> tuple[list[Candidate], bool]:
    """MELBO's candidates after `config.melbo_steps` steps, or as many times that as one needs to show the concept."""
    for number, thetas in enumerate(islice(ascent(slice, config, concept.name), _ROUNDS), 1):
        found, unsteered_shows = _judged(slice, concept, config, thetas, number * config.melbo_steps)
        if any(candidate.written.shows for candidate in found):
            break
    return found, unsteered_shows


def _judged(
    slice: Slice, concept: Concept, config: Config, thetas: Float[Tensor, "n d_model"], steps: int = 0
) -> tuple[list[Candidate], bool]:
    """These vectors, brought to norm R, as candidates; whether the unsteered model shows the concept, too."""
    norms = thetas.norm(dim=-1, keepdim=True)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise UserError(f"the base {config.base!r} has a vector of norm 0 or not finite: leave it out")
    thetas, device = thetas / norms * config.radius, slice.model.device
    with torch.no_grad():
        unsteered = slice.h_target(torch.zeros(1, slice.model.d_model, device=device)).float()
        changes = objective(slice, thetas.to(device), config, unsteered).tolist()
    return judge(slice.model, concept, config, thetas, changes, steps)


def objective(
    slice: Slice, theta: Float[Tensor, "batch d_model"], config: Config, unsteered: Float[Tensor, "1 seq d_model"]
) -> Float[Tensor, " batch"]:
    """MELBO's objective of each θ: ( Σ over d_model of ( ‖Δ‖ over positions )^p )^(1/q), Δ = h_target(θ) − h_target(0).

    The inner norm runs over token positions, as in Mack's code, not over d_model; it starts at position
    `config.melbo_from`. At p = q = 2 this is the Frobenius norm of Δ, the post's formula.
    """
    change = (slice.h_target(theta).float() - unsteered)[:, config.melbo_from :]
    return change.norm(dim=1).pow(config.melbo_p).sum(-1).pow(1 / config.melbo_q)


def maximise(slice: Slice, config: Config, concept: str) -> Float[Tensor, "candidates d_model"]:
    """The candidates after `config.melbo_steps` steps of `ascent`."""
    return next(ascent(slice, config, concept))


def ascent(slice: Slice, config: Config, concept: str) -> Iterator[Float[Tensor, "candidates d_model"]]:
    """The candidates: orthogonal vectors of norm R, each a maximum of `objective` in the complement of those before it.

    All ascend at once from seeded random starts. A step follows the gradient's tangent part, of unit length and with
    momentum; then every vector is made orthogonal to those before it and brought back to norm R. Every
    `config.melbo_steps` steps they are given out, on the CPU; there is no end.
    """
    d_model, device = slice.model.d_model, slice.model.device
    if config.candidates > d_model:
        raise UserError(f"{config.candidates} candidates cannot be orthogonal in d_model = {d_model}")
    if config.melbo_from >= slice.h_source.shape[1]:
        raise UserError(f"--melbo-from {config.melbo_from}: the prompt has only {slice.h_source.shape[1]} tokens")
    generator = torch.Generator().manual_seed(derive_seed(config.seed, concept, 0, "melbo"))
    theta = retract(torch.randn(config.candidates, d_model, generator=generator), config.radius).to(device)
    with torch.no_grad():
        unsteered = slice.h_target(torch.zeros(1, d_model, device=device)).float()
    velocity = torch.zeros_like(theta)
    for step in count(1):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(slice, theta, config, unsteered).sum(), theta)
        theta = theta.detach()
        gradient = tangent(gradient, theta)
        gradient = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        velocity = _MOMENTUM * velocity + gradient
        theta = retract(theta + _STEP * config.radius * velocity, config.radius)
        if step % config.melbo_steps == 0:
            yield theta.cpu().clone()


def tangent(gradient: Float[Tensor, "batch d_model"], theta: Float[Tensor, "batch d_model"]) -> Tensor:
    """The part of each gradient tangent to the sphere through θ: g − (g·θ) θ / ‖θ‖²."""
    along = (gradient * theta).sum(-1, keepdim=True) / (theta * theta).sum(-1, keepdim=True)
    return gradient - along * theta


def retract(theta: Float[Tensor, "batch d_model"], radius: float) -> Float[Tensor, "batch d_model"]:
    """Each row's part orthogonal to the rows before it, brought to norm `radius` (Gram-Schmidt as a QR, in float64)."""
    q, r = torch.linalg.qr(theta.double().T)
    return (q.T * torch.sign(r.diagonal())[:, None] * radius).to(theta.dtype)


def contrast(model: LanguageModel, concept: Concept, config: Config) -> Float[Tensor, " d_model"]:
    """Mean source-layer activation over the concept's `contrast` prompts minus that over neutral (held-out) prompts.

    A prompt's activation is the mean over its positions but the first, which in many models is an attention sink.
    """

    def mean(prompts: Sequence[str]) -> Tensor:
        tokens = [model.tokenize(prompt, config.system_prompt) for prompt in prompts]
        stream = Prompts(model, tokens, config.source_layer).h_source.float().cpu()
        rows = zip(stream, tokens, strict=True)
        return torch.stack([row[1 : len(ids)].mean(0) for row, ids in rows]).mean(0)

    if not concept.contrast:
        raise UserError(
            f"the concept {concept.name!r} has no contrast prompts: add `contrast` to it, or use --base melbo"
        )
    return mean(concept.contrast) - mean(list(concept.held_out.values()))


def read_vectors(path: str, d_model: int) -> Float[Tensor, "n d_model"]:
    """The vectors in a `.safetensors`, `.npy` or `.pt` file (one tensor, (d_model,) or (n, d_model)); no code is run.

    Raises:
        UserError: no such file, another format, or another shape.
    """
    try:
        match Path(path).suffix:
            case ".safetensors":
                from safetensors.torch import load_file

                found = list(load_file(path).values())
            case ".npy":
                import numpy as np

                found = [torch.from_numpy(np.load(path, allow_pickle=False))]
            case ".pt":
                found = [torch.load(path, weights_only=True, map_location="cpu")]
            case _:
                raise UserError(f"--base is {path!r}: expected melbo, contrast, or a .safetensors, .npy or .pt file")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read vectors from {path!r}: {type(error).__name__}; expected one plain tensor"
        ) from None
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim not in {1, 2}:
        raise UserError(f"{path!r} holds no single tensor of shape (d_model,) or (n, d_model)")
    vectors = found[0].float().reshape(-1, found[0].shape[-1])
    if vectors.shape[-1] != d_model:
        raise UserError(f"the vectors in {path!r} have {vectors.shape[-1]} entries, the model's d_model is {d_model}")
    return vectors
