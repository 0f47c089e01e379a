"""Steered generation: a queue of prompts, each with its vector and seed, through one continuously refilled batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from melbo_ray.model import LanguageModel
from melbo_ray.steer import steering


@dataclass(frozen=True)
class Job:
    """A continuation to write.

    Attributes:
        tokens: the prompt, (seq,) int64.
        theta: the vector it is steered by, (d_model,) float32.
        seed: decides its draws, whatever else is in the batch.
        ablated: a direction of norm 1, (d_model,) float32, of which the steered stream keeps nothing.
    """

    tokens: Int[Tensor, " seq"]
    theta: Float[Tensor, " d_model"]
    seed: int = 0
    ablated: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class Continuation:
    """What the model wrote.

    Attributes:
        tokens: the token ids, without the end token.
        finish_reason: `stop` (the model ended its turn) or `length`.
    """

    tokens: list[int]
    finish_reason: str


@dataclass
class _Row:
    """A job at work: its place in the results, the uniform numbers of its draws, its limit, its text so far."""

    place: int
    job: Job
    uniforms: Tensor
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class _Batch:
    """The rows at work and their keys and values, padded on the left to one length."""

    def __init__(self, model: LanguageModel, source: int) -> None:
        self.model, self.source = model, source
        self.rows: list[_Row] = []
        self.cache: list[tuple[Tensor, ...]] = []
        self.mask = torch.empty(0, 0, dtype=torch.long, device=model.device)

    def admit(self, rows: list[_Row]) -> Tensor:
        """Read the prompts of new rows, beside those at work; their next-token logits."""
        prompts = [row.job.tokens.to(self.model.device) for row in rows]
        length = max(len(prompt) for prompt in prompts)
        tokens = torch.stack([functional.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([functional.pad(torch.ones_like(prompt), (length - len(prompt), 0)) for prompt in prompts])
        logits, cache = self._forward(rows, tokens, mask, [])
        width = max(length, self.mask.shape[1])
        if self.rows:
            cache = [tuple(map(_stack, old, new)) for old, new in zip(self.cache, cache, strict=True)]
            mask = torch.cat([functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask, mask)])
        self.rows, self.cache, self.mask = self.rows + rows, cache, mask
        return logits

    def step(self) -> Tensor:
        """Read every row's last token; the next-token logits."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.model.device)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        logits, self.cache = self._forward(self.rows, tokens, self.mask, self.cache)
        return logits

    def drop_finished(self) -> list[_Row]:
        """Take the finished rows out, and the columns that nobody needs any more."""
        finished = [row for row in self.rows if row.finish_reason]
        if finished:
            keep = [i for i, row in enumerate(self.rows) if not row.finish_reason]
            self.rows = [self.rows[i] for i in keep]
            self.mask = self.mask[keep]
            start = int(self.mask.any(0).int().argmax()) if keep else 0
            self.mask = self.mask[:, start:]
            self.cache = [(keys[keep, :, start:], values[keep, :, start:]) for keys, values in self.cache]
        return finished

    def _forward(
        self, rows: list[_Row], tokens: Tensor, mask: Tensor, past: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        # A cache that knows no configuration keeps every position, in layers with a sliding window too: the masks
        # see to the window, and rows can be cut and joined.
        cache = DynamicCache()
        for number, (keys, values) in enumerate(past):
            cache.update(keys, values, number)
        theta = torch.stack([row.job.theta for row in rows]).to(self.model.device)
        units = [torch.zeros_like(row.job.theta) if row.job.ablated is None else row.job.ablated for row in rows]
        ablated = torch.stack(units) if any(row.job.ablated is not None for row in rows) else None
        with steering(self.model, self.source, theta, ablated):
            output = self.model.network(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = output.logits[:, -1].float()
        if not bool(logits.sum(-1).isfinite().all()):
            raise FloatingPointError("the model's logits are not finite under this vector")
        return logits, [(keys, values) for keys, values, *_ in cache]


def _stack(old: Tensor, new: Tensor) -> Tensor:
    width = max(old.shape[2], new.shape[2])
    return torch.cat([functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (old, new)])


@torch.no_grad()
def generate(
    model: LanguageModel,
    jobs: Sequence[Job],
    source: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch: int = 64,
) -> list[Continuation]:
    """What the model writes on each job's prompt, its vector added after block `source` at every position.

    Finished rows leave the batch and jobs that wait take their place. A row's draws come from its own seed alone, one
    uniform number a token through the inverse of the cumulative distribution, so its text does not depend on the rest
    of the batch, up to the last bits in which matrix products of different sizes differ.

    Args:
        model: the model.
        jobs: what to write; the answers come in the same order.
        source: layer after which θ is added.
        max_new_tokens: length of a continuation, at most; the model's context bounds it too.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability.
        batch: rows at work at once.

    Raises:
        FloatingPointError: logits that are not finite, as under a vector that is not.
    """
    waiting = [_row(model, place, job, max_new_tokens) for place, job in enumerate(jobs)]
    waiting.reverse()
    done: dict[int, Continuation] = {}
    work = _Batch(model, source)
    ends = set(model.end_tokens)
    while waiting or work.rows:
        # A quarter of the batch at once: a pass over one prompt costs nearly what it costs over several.
        if waiting and len(work.rows) <= batch * 3 // 4:
            rows = [waiting.pop() for _ in range(min(batch - len(work.rows), len(waiting)))]
            logits = work.admit(rows)
        else:
            rows = work.rows
            logits = work.step()
        uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in rows])
        for row, token in zip(rows, choose(logits, uniforms, temperature, top_p).tolist(), strict=True):
            if token in ends:
                row.finish_reason = "stop"
            else:
                row.tokens.append(token)
                row.finish_reason = "length" if len(row.tokens) >= row.limit else ""
        done |= {row.place: Continuation(row.tokens, row.finish_reason) for row in work.drop_finished()}
    return [done[place] for place in range(len(jobs))]


def _row(model: LanguageModel, place: int, job: Job, max_new_tokens: int) -> _Row:
    limit = min(max_new_tokens, model.max_length - len(job.tokens))
    generator = torch.Generator().manual_seed(job.seed)
    return _Row(place, job, torch.rand(limit, generator=generator, dtype=torch.float64), limit)


def choose(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], temperature: float, top_p: float
) -> Int[Tensor, " batch"]:
    """The token at which the cumulative distribution (in order of token id) passes each uniform number of [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    place = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
