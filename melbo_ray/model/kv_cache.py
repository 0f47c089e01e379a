"""Batched decoding with a static key-value cache, whose step is recorded once per model.

A new generation takes the slot of a finished one; shapes stay constant, so one recording serves every step.
"""

import functools
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from melbo_ray.errors import UserError, first_line
from melbo_ray.model.architecture import KNOWN_MASKS, layer_types, masks
from melbo_ray.model.compiled_step import Recorded, agree
from melbo_ray.model.hooks import logits_at, steering
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.packed_linear import onednn
from melbo_ray.model.products import multiplying


@dataclass(frozen=True)
class Request:
    """A prompt to continue under a vector.

    Attributes:
        tokens: token ids of the prompt, (seq,) int64.
        theta: steering vector, (d_model,) float32.
        seed: seed of the random draws, which do not depend on the rest of the batch.
        ablated: unit vector projected out of the steered stream, (d_model,) float32; None for nothing.
        temperature: sampling temperature; 0 is greedy.
    """

    tokens: Int[Tensor, " seq"]
    theta: Float[Tensor, " d_model"]
    seed: int = 0
    ablated: Float[Tensor, " d_model"] | None = None
    temperature: float = 1.0


@dataclass
class Generation:
    """The state of a request in a slot.

    Attributes:
        index: position of the request and of its result.
        request: the request.
        uniforms: random numbers in [0, 1), one per token, (limit,) float64.
        limit: maximum number of tokens to generate.
        tokens: the generated tokens, without the end token.
        finish_reason: empty while unfinished, then `stop` or `length`.
    """

    index: int
    request: Request
    uniforms: Tensor
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class _SlotCache(Cache):
    """Keys and values of every layer, (slots, heads, width, head_dim); each slot has its own position."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.positions: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple:
        """Write one token's keys and values per slot, (slots, heads, 1, head_dim); return those of all positions."""
        held = self.keys[layer_idx], self.values[layer_idx]
        at = torch.arange(len(key_states), device=key_states.device), self.positions.to(key_states.device)
        for cached, states in zip(held, (key_states, value_states), strict=True):
            cached[at[0], :, at[1]] = states[:, :, 0]
        return held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, because every call passes its positions and masks."""
        return 0

    def admit(self, slots: Tensor, prompts: DynamicCache, shape: tuple[int, int]) -> None:
        """Copy the prompts' keys and values into their slots, and clear the rest of these slots."""
        for number, (keys, values, *_) in enumerate([*prompts]):
            for held, states in ((self.keys, keys), (self.values, values)):
                if number not in held:
                    held[number] = states.new_zeros(shape[0], states.shape[1], shape[1], states.shape[3])
                where = slots.to(states.device)
                # Stale values that are not finite would pass through the mask as NaN.
                held[number][where] = 0
                held[number][where, :, : states.shape[2]] = states


class Batch:
    """Active generations, each in a slot whose keys and values stay cached while other slots change.

    The first cached step is compared with a pass over the whole texts. If they differ, a warning says so, and every
    step prefills the whole texts. The layout is that of transformers' static cache, with a position per slot.

    Args:
        model: the model; held weakly.
        source: layer to whose output θ is added.
        slots: number of slots.
        width: maximum number of tokens per slot, including the prompt.
    """

    def __init__(self, model: LanguageModel, source: int, slots: int, width: int) -> None:
        self.model, self.source, self.shape = weakref.proxy(model), source, (slots, width)
        self.active: dict[int, Generation] = {}
        self.cache = _SlotCache()
        self.theta, self.ablated = torch.zeros(2, slots, model.d_model, device=model.device)
        together = {parameter.device for parameter in model.network.parameters()} <= {model.device}
        step = functools.partial(Batch._decode, weakref.proxy(self))
        self.decode = Recorded(step, packed=model.packed) if together else step
        # Whether keys and values are cached; whether a cached step was compared with a pass over the whole texts.
        self.cached, self.checked = True, False
        # Without a mask for a layer type, every step prefills the whole texts.
        if unknown := set(layer_types(model.network)) - KNOWN_MASKS:
            self._disable_cache(f"the masks of {min(unknown)} are not known here")

    def admit(self, generations: list[Generation]) -> Float[Tensor, "admitted vocab"]:
        """Prefill new generations, at most as many as slots are free; return their next-token logits, float32."""
        free = [slot for slot in range(self.shape[0]) if slot not in self.active][: len(generations)]
        self.active |= zip(free, generations, strict=True)
        requests = [generation.request for generation in generations]
        ablated = [torch.zeros_like(r.theta) if r.ablated is None else r.ablated for r in requests]
        slots = torch.tensor(free).to(self.theta.device)
        self.theta[slots] = torch.stack([request.theta for request in requests]).to(self.theta)
        self.ablated[slots] = torch.stack(ablated).to(self.ablated)
        logits = self._prefill_and_cache(free, slots) if self.cached else None
        return self._prefill(free, None) if logits is None else logits

    def _prefill_and_cache(self, slots: list[int], where: Tensor) -> Tensor | None:
        """Prefill these slots, cache their keys and values; None if the model does not use this kind of cache.

        `where` are the slots on the device.
        """
        # A cache without a configuration keeps every position, also in layers with a sliding window.
        prompts = DynamicCache()
        try:
            logits = self._prefill(slots, prompts)
            self.cache.admit(where, prompts, self.shape)
        except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # Models raise errors of any type for a cache that is not of their own kind.
        except Exception as error:
            self._disable_cache(first_line(error))
            return None
        return logits

    def step(self) -> Float[Tensor, "generations vocab"]:
        """Process the last token of every active generation; next-token logits in the order of `active`, float32."""
        if self.cached and self.checked:
            return self._next()
        whole = self._prefill(list(self.active), None)
        # A vector that breaks the model says nothing about its cache.
        if self.cached and bool(whole.isfinite().all()):
            self.checked = True
            try:
                if not agree(self._next(), whole):
                    raise RuntimeError("this model writes something else with them")
            # Models raise errors of any type for arguments that they do not accept.
            except Exception as error:
                self._disable_cache(first_line(error))
        return whole

    def _disable_cache(self, reason: str) -> None:
        warnings.warn(f"keys and values are not kept, which costs time only: {reason}", stacklevel=3)
        self.cached = False

    def _prefill(self, slots: list[int], cache: DynamicCache | None) -> Tensor:
        """Next-token logits of these slots, from one pass over their prompts and generated tokens; float32."""
        active = [self.active[slot] for slot in slots]
        texts = [torch.cat([g.request.tokens, torch.tensor(g.tokens, dtype=torch.long)]) for g in active]
        # Right padding is invisible to a causal model.
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.theta.device)
        last = torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])
        theta, ablated = self.theta[slots], self.ablated[slots]
        steered = steering(self.model, self.source, theta, ablated)
        with steered, logits_at(self.model, last), onednn(), multiplying(self.model):
            output = self.model.network(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        return output.logits[0].float()

    def _next(self) -> Tensor:
        """Next-token logits of the active generations, from their last tokens and the cache; float32."""
        tokens, positions = [0] * self.shape[0], [0] * self.shape[0]
        for slot, active in self.active.items():
            tokens[slot], positions[slot] = active.tokens[-1], len(active.request.tokens) + len(active.tokens) - 1
        slots = [*self.active, *[0] * (self.shape[0] - len(self.active))]
        # In one transfer.
        moved = torch.tensor([tokens, positions, slots]).to(self.theta.device)
        return self.decode(moved[0], moved[1], self.theta, self.ablated)[0][moved[2, : len(self.active)]]

    def _decode(self, tokens: Tensor, positions: Tensor, theta: Tensor, ablated: Tensor) -> tuple[Tensor]:
        self.cache.positions = positions
        columns, here = torch.arange(self.shape[1], device=positions.device)[None], positions[:, None]
        with steering(self.model, self.source, theta, ablated), multiplying(self.model):
            output = self.model.network(
                input_ids=tokens[:, None],
                attention_mask=masks(self.model.network, (columns <= here)[:, None], here, columns),
                position_ids=positions[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        return (output.logits[:, -1].float(),)

    def pop_finished(self) -> list[Generation]:
        """Remove the finished generations from their slots and return them."""
        finished = {slot: active for slot, active in self.active.items() if active.finish_reason}
        self.active = {slot: active for slot, active in self.active.items() if slot not in finished}
        return list(finished.values())
