"""Steered text generation with continuous batching: each request has its own prompt, vector and seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.host import progress
from melbo_ray.model.kv_cache import Batch, Generation, Request
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.soundness import require_steerable

# Slots of a batch. On the CPU a step with 16 slots takes a third longer than one with 4, and one with 32 nearly twice.
_SLOTS = {"cpu": 16}
_SLOTS_ON_A_GPU = 64
# The width of a slot is a multiple of this number of tokens, prompt included.
_WIDTH = 128


@dataclass(frozen=True)
class Continuation:
    """A generated text.

    Attributes:
        tokens: token ids, without the end token.
        finish_reason: `stop` (the model ended its turn) or `length`.
    """

    tokens: list[int]
    finish_reason: str


@torch.no_grad()
def generate(
    model: LanguageModel,
    requests: Sequence[Request],
    source: int,
    *,
    max_new_tokens: int,
    top_p: float = 1.0,
    slots: int | None = None,
) -> list[Continuation]:
    """Generate a continuation of each request's prompt, with its vector added to layer `source` at every position.

    Requests take the slots of finished generations. Each token is drawn with one uniform number from the request's own
    seed through the inverse cumulative distribution, so a text does not depend on the rest of the batch, except for
    rounding in the prefill, whose matrix products differ in size.

    Args:
        model: the model.
        requests: prompts, vectors and seeds.
        source: layer to whose output θ is added.
        max_new_tokens: maximum length of a continuation, tokens; the model's context limits it too.
        top_p: sample from the smallest set of tokens with at least this total probability.
        slots: number of slots; by default a number that suits the device.

    Returns:
        The continuations, in the order of `requests`.

    Raises:
        UserError: the model cannot be steered (`require_steerable`).
        FloatingPointError: logits that are not finite, for example under a vector that is not finite.
    """
    found = written(model, requests, source, max_new_tokens=max_new_tokens, top_p=top_p, slots=slots)
    done = {g.index: Continuation(g.tokens, g.finish_reason) for g, _ in found if g.finish_reason}
    return [done[index] for index in range(len(requests))]


def written(
    model: LanguageModel,
    requests: Sequence[Request],
    source: int,
    *,
    max_new_tokens: int,
    top_p: float = 1.0,
    slots: int | None = None,
) -> Iterator[tuple[Generation, Float[Tensor, " vocab"]]]:
    """The same token by token: every generation after each of its steps, with the logits of that step, float32.

    Arguments and errors as in `generate`. A generation is done once it has a `finish_reason`.
    """
    if requests:
        require_steerable(model, requests[0].tokens)
    waiting = [_generation(model, index, request, max_new_tokens) for index, request in enumerate(requests)][::-1]
    slots = slots or default_slots(model.device.type)
    batch = _batch(model, source, slots, max((len(g.request.tokens) + g.limit for g in waiting), default=0))
    ends = set(model.end_tokens)
    while waiting or batch.active:
        progress.passes += 1
        with torch.no_grad():
            # Prefill at least a quarter of the slots at once: one prompt takes nearly as long as several.
            if waiting and (room := slots - len(batch.active)) >= max(1, slots // 4):
                generations = [waiting.pop() for _ in range(min(room, len(waiting)))]
                logits = batch.admit(generations)
            else:
                generations = list(batch.active.values())
                logits = batch.step()
            tokens = _chosen(generations, logits, top_p)
        for generation, token in zip(generations, tokens, strict=True):
            if token in ends:
                generation.finish_reason = "stop"
            else:
                generation.tokens.append(token)
                generation.finish_reason = "length" if len(generation.tokens) >= generation.limit else ""
        batch.pop_finished()
        yield from zip(generations, logits, strict=True)


def default_slots(device: str) -> int:
    """Default number of slots on a device of this type."""
    return _SLOTS.get(device, _SLOTS_ON_A_GPU)


def width(length: int) -> int:
    """Width in tokens of a slot for texts of this length."""
    return -(-length // _WIDTH) * _WIDTH


def _batch(model: LanguageModel, source: int, slots: int, length: int) -> Batch:
    """An empty batch for texts of this length; the model's previous one if it fits."""
    batch = model.kept.get("batch")
    if batch is None or batch.source != source or batch.shape[0] != slots or batch.shape[1] < length:
        batch = model.kept["batch"] = Batch(model, source, slots, width(length))
    batch.active = {}
    return batch


def _chosen(generations: list[Generation], logits: Tensor, top_p: float) -> list[int]:
    uniforms = torch.stack([g.uniforms[len(g.tokens)] for g in generations])
    temperatures = torch.tensor([g.request.temperature for g in generations], dtype=torch.float32)
    return choose(logits, uniforms, temperatures, top_p).tolist()


def _generation(model: LanguageModel, index: int, request: Request, max_new_tokens: int) -> Generation:
    limit = min(max_new_tokens, model.max_length - len(request.tokens))
    generator = torch.Generator().manual_seed(request.seed)
    return Generation(index, request, torch.rand(limit, generator=generator, dtype=torch.float64), limit)


def choose(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, " batch"],
    temperatures: Float[Tensor, " batch"],
    top_p: float,
) -> Int[Tensor, " batch"]:
    """The token at which the cumulative distribution, in order of token id, exceeds each uniform number in [0, 1).

    At temperature 0 it is the most likely token.
    """
    temperatures = temperatures.to(logits)[:, None]
    greedy = temperatures == 0
    probabilities = (logits / temperatures.masked_fill(greedy, 1)).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    level = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy[:, 0], logits.argmax(-1), drawn)
