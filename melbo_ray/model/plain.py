"""The reference side of the self-check: plain transformers with forward hooks, one text at a time.

It shares no code with the implementation that is checked.
"""

import contextlib
import inspect
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from melbo_ray.config import ChainOptions
from melbo_ray.model.language_model import LanguageModel

END = -1
"""Placeholder for any token that ends a text."""

Tokens = Int[Tensor, " _seq"]


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by the hook of the requested layer to end the forward pass."""


@contextlib.contextmanager
def _adding(model: LanguageModel, source: int, theta: Float[Tensor, "batch d_model"]) -> Generator[None]:
    def add(_layer: nn.Module, _args: tuple, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        steered = (h.float() + theta[:, None].to(h.device)).to(h.dtype)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = model.layers[source].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def stream(
    model: LanguageModel, tokens: Tokens, layer: int, source: int | None = None, theta: Tensor | None = None
) -> Float[Tensor, "seq d_model"]:
    """The output of layer `layer` on one prompt, float32, with θ added to the output of layer `source`."""
    found: list[Tensor] = []

    def take(_layer: nn.Module, _args: tuple, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].float())
        raise _Reached

    steered = contextlib.nullcontext() if theta is None or source is None else _adding(model, source, theta[None])
    handle = model.layers[layer].register_forward_hook(take)
    try:
        with steered, contextlib.suppress(_Reached):
            model.network(input_ids=tokens[None].to(model.device), use_cache=False)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def logits(
    model: LanguageModel, tokens: Tokens, source: int, theta: Float[Tensor, "batch d_model"], last: int
) -> Float[Tensor, "batch last vocab"]:
    """The logits of the last `last` positions of one text under each θ, float32."""
    keeps = "logits_to_keep" in inspect.signature(model.network.forward).parameters
    with _adding(model, source, theta):
        ids = tokens.expand(len(theta), -1).to(model.device)
        output = model.network(input_ids=ids, use_cache=False, **({"logits_to_keep": last} if keeps else {}))
    return output.logits[:, -last:].float()


@torch.no_grad()
def text(
    model: LanguageModel, tokens: Tokens, source: int, theta: Float[Tensor, " d_model"], length: int
) -> tuple[list[int], list[Tensor]]:
    """The greedy text of transformers' `generate`, and the logits of each token, float32 on the CPU."""
    ends = model.end_tokens
    network: Any = model.network
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=ends or None, pad_token_id=(ends or [0])[0],
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ids = tokens[None].to(model.device)
    # Unset fields default to the model's generation config, such as a repetition penalty.
    before, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with _adding(model, source, theta[None]):
            found = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    # For a model class without a working `generate`, decoding without a cache is an equivalent reference.
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return reread(model, tokens, source, theta, length)
    finally:
        network.generation_config = before
    written = found.sequences[0, len(tokens) :].tolist()
    return [END if token in ends else token for token in written], [row[0].float().cpu() for row in found.logits]


def reread(
    model: LanguageModel, tokens: Tokens, source: int, theta: Float[Tensor, " d_model"], length: int
) -> tuple[list[int], list[Tensor]]:
    """The same as `text`, with a full forward pass at each token instead of a cache."""
    written, read = [], []
    while len(written) < length and END not in written:
        read.append(logits(model, tokens, source, theta[None], 1)[0, 0].cpu())
        best = read[-1].argmax()
        written.append(END if int(best) in model.end_tokens else int(best))
        tokens = torch.cat([tokens, best[None]])
    return written, read


def steps(
    model: LanguageModel,
    tokens: Tokens,
    layers: tuple[int, int],
    options: ChainOptions,
    thetas: Float[Tensor, "2 d_model"],
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each of two θ on one prompt: h_target, z, the loss against the other θ's z, and its gradient, on the CPU.

    `layers` are source and target.
    """
    source, target = layers
    free = [theta.to(model.device).requires_grad_() for theta in thetas]
    streams = [stream(model, tokens, target, source, theta) for theta in free]
    z = [h[options.z_from :].mean(0) for h in streams]
    found = []
    for i in range(2):
        loss = (z[i] - z[1 - i].detach()).norm() + options.norm_penalty * free[i].norm().to(z[i].device)
        (gradient,) = torch.autograd.grad(loss, free[i])
        h, mean, value, slope = (part.detach().float().cpu() for part in (streams[i], z[i], loss, gradient))
        found.append((h, mean, value, slope))
    return found
