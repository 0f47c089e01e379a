"""One decoding step of many rows at fixed places: a static key-value cache, recorded once for a model.

A new row takes the place of a finished one; nothing changes its shape, so the same recording serves every step.
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
from melbo_ray.model.hooks import reading, steering
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.packed_linear import onednn


@dataclass(frozen=True)
class Job:
    """A continuation to write.

    Attributes:
        tokens: the prompt, (seq,) int64.
        theta: the vector it is steered by, (d_model,) float32.
        seed: decides its draws, whatever else is in the batch.
        ablated: a direction of norm 1, (d_model,) float32, of which the steered stream keeps nothing.
        temperature: 0 is greedy.
    """

    tokens: Int[Tensor, " seq"]
    theta: Float[Tensor, " d_model"]
    seed: int = 0
    ablated: Float[Tensor, " d_model"] | None = None
    temperature: float = 1.0


@dataclass
class Row:
    """A job at work.

    Attributes:
        index: of the job, and of its result.
        job: what to write.
        uniforms: (limit,) float64 of [0, 1), one for each draw.
        limit: tokens to write at most.
        tokens: what has been written, without the end token.
        finish_reason: empty until it is `stop` or `length`.
    """

    index: int
    job: Job
    uniforms: Tensor
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class _Places(Cache):
    """Keys and values of every layer, (places, heads, width, head_dim); each row writes at a position of its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.positions: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple:
        """Write one token's keys and values, (places, heads, 1, head_dim); all there are."""
        held = self.keys[layer_idx], self.values[layer_idx]
        at = torch.arange(len(key_states), device=key_states.device), self.positions.to(key_states.device)
        for place, states in zip(held, (key_states, value_states), strict=True):
            place[at[0], :, at[1]] = states[:, :, 0]
        return held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: positions and masks are given with every call."""
        return 0

    def admit(self, places: Tensor, prompts: DynamicCache, shape: tuple[int, int]) -> None:
        """The prompts' keys and values go to their places, and nothing of what was there before stays."""
        for number, (keys, values, *_) in enumerate([*prompts]):
            for held, states in ((self.keys, keys), (self.values, values)):
                if number not in held:
                    held[number] = states.new_zeros(shape[0], states.shape[1], shape[1], states.shape[3])
                where = places.to(states.device)
                # Whatever is not finite there would get past the mask.
                held[number][where] = 0
                held[number][where, :, : states.shape[2]] = states


class Batch:
    """Rows at work, each at a place of its own: keys and values stay there while its neighbours come and go.

    The first step on what is kept is compared with one that reads everything anew; a model that does not agree reads
    everything anew at each token, and a warning says so. The layout is that of transformers' static cache, but for the
    position, which each row has for itself.

    Args:
        model: the model; held weakly.
        source: layer after which θ is added.
        places: rows at work at most.
        width: tokens of a row at most, prompt included.
    """

    def __init__(self, model: LanguageModel, source: int, places: int, width: int) -> None:
        self.model, self.source, self.shape = weakref.proxy(model), source, (places, width)
        self.rows: dict[int, Row] = {}
        self.cache = _Places()
        self.theta, self.units = torch.zeros(2, places, model.d_model, device=model.device)
        together = {parameter.device for parameter in model.network.parameters()} <= {model.device}
        step = functools.partial(Batch._decode, weakref.proxy(self))
        self.decode = Recorded(step, packed=model.packed) if together else step
        # Whether keys and values are kept; whether that was compared with reading everything anew.
        self.cached, self.checked = True, False
        # Models with others read everything anew at each token.
        if unknown := set(layer_types(model.network)) - KNOWN_MASKS:
            self._forgo(f"the masks of {min(unknown)} are not known here")

    def admit(self, rows: list[Row]) -> Float[Tensor, "admitted vocab"]:
        """Read the prompts of new rows, no more than places are free; their next-token logits, float32.

        Raises:
            FloatingPointError: logits that are not finite.
        """
        free = [place for place in range(self.shape[0]) if place not in self.rows][: len(rows)]
        self.rows |= zip(free, rows, strict=True)
        jobs = [row.job for row in rows]
        units = [torch.zeros_like(job.theta) if job.ablated is None else job.ablated for job in jobs]
        places = torch.tensor(free).to(self.theta.device)
        self.theta[places] = torch.stack([job.theta for job in jobs]).to(self.theta)
        self.units[places] = torch.stack(units).to(self.units)
        logits = self._read_and_keep(places) if self.cached else None
        return self._read(places, None) if logits is None else logits

    def _read_and_keep(self, places: Tensor) -> Tensor | None:
        """Read these places' rows and keep their keys and values; None where the model has none of this kind."""
        # A cache that knows no configuration keeps every position, in layers with a sliding window too.
        prompts = DynamicCache()
        try:
            logits = self._read(places, prompts)
            self.cache.admit(places, prompts, self.shape)
        except (FloatingPointError, UserError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # What a model says to a cache that is not of its own kind is its own.
        except Exception as error:
            self._forgo(first_line(error))
            return None
        return logits

    def step(self) -> Float[Tensor, "rows vocab"]:
        """Read every row's last token; the next-token logits in the order of `rows`, float32.

        Raises:
            FloatingPointError: logits that are not finite.
        """
        places = torch.tensor(list(self.rows)).to(self.theta.device)
        if not self.cached:
            return self._read(places, None)
        if self.checked:
            return _finite(self._next()[places])
        self.checked, whole = True, self._read(places, None)
        try:
            if not agree(self._next()[places], whole):
                raise RuntimeError("this model writes something else with them")
        # What a model says to arguments that it does not know is its own.
        except Exception as error:
            self._forgo(first_line(error))
        return whole

    def _forgo(self, reason: str) -> None:
        warnings.warn(f"keys and values are not kept, which costs time only: {reason}", stacklevel=3)
        self.cached = False

    def _read(self, places: Tensor, cache: DynamicCache | None) -> Tensor:
        """All the tokens of these places' rows, read at once; their next-token logits."""
        rows = [self.rows[place] for place in places.tolist()]
        texts = [torch.cat([row.job.tokens, torch.tensor(row.tokens, dtype=torch.long)]) for row in rows]
        # Padded on the right, where a causal model does not look.
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.theta.device)
        last = torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])
        theta, units = self.theta[places], self.units[places]
        with steering(self.model, self.source, theta, units), reading(self.model, last), onednn():
            output = self.model.network(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        return _finite(output.logits[0].float())

    def _next(self) -> Tensor:
        """The next-token logits of every place, from its last token and what is kept."""
        tokens, positions = torch.zeros(2, self.shape[0], dtype=torch.long)
        for place, row in self.rows.items():
            tokens[place], positions[place] = row.tokens[-1], len(row.job.tokens) + len(row.tokens) - 1
        moved = tokens.to(self.theta.device), positions.to(self.theta.device)
        return self.decode(*moved, self.theta, self.units)[0]

    def _decode(self, tokens: Tensor, positions: Tensor, theta: Tensor, units: Tensor) -> tuple[Tensor]:
        self.cache.positions = positions
        columns, here = torch.arange(self.shape[1], device=positions.device)[None], positions[:, None]
        with steering(self.model, self.source, theta, units):
            output = self.model.network(
                input_ids=tokens[:, None],
                attention_mask=masks(self.model.network, (columns <= here)[:, None], here, columns),
                position_ids=positions[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        return (output.logits[:, -1].float(),)

    def drop_finished(self) -> list[Row]:
        """Take the finished rows out."""
        finished = {place: row for place, row in self.rows.items() if row.finish_reason}
        self.rows = {place: row for place, row in self.rows.items() if place not in finished}
        return list(finished.values())


def _finite(logits: Tensor) -> Tensor:
    if not bool(logits.sum(-1).isfinite().all()):
        raise FloatingPointError("the model's logits are not finite under this vector")
    return logits
