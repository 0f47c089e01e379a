"""Steered generation: a queue of prompts, each with its vector and seed, through a batch that is refilled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.model.kv_cache import Batch, Job, Row
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.soundness import require_steerable

# Rows at work at once. On the CPU a step of 16 rows costs a third more than one of 4, and one of 32 nearly twice.
_PLACES = {"cpu": 16}
_PLACES_ON_A_GPU = 64
# A batch is made for texts of this length or a multiple of it, prompt included.
_WIDTH = 128


@dataclass(frozen=True)
class Continuation:
    """What the model wrote.

    Attributes:
        tokens: the token ids, without the end token.
        finish_reason: `stop` (the model ended its turn) or `length`.
    """

    tokens: list[int]
    finish_reason: str


@torch.no_grad()
def generate(
    model: LanguageModel,
    jobs: Sequence[Job],
    source: int,
    *,
    max_new_tokens: int,
    top_p: float = 1.0,
    places: int | None = None,
) -> list[Continuation]:
    """What the model writes on each job's prompt, its vector added after block `source` at every position.

    Finished rows leave the batch and jobs that wait take their places. A row's draws come from its own seed alone, one
    uniform number a token through the inverse of the cumulative distribution, so its text does not depend on the rest
    of the batch, up to the last bits in which matrix products of different sizes differ (where prompts are read).

    Args:
        model: the model.
        jobs: what to write; the answers come in the same order.
        source: layer after which θ is added.
        max_new_tokens: length of a continuation, at most; the model's context bounds it too.
        top_p: sample from the smallest set of tokens with at least this probability.
        places: rows at work at once; by default as many as suit the device.

    Raises:
        UserError: what `require_steerable` raises.
        FloatingPointError: logits that are not finite, as under a vector that is not.
    """
    if jobs:
        require_steerable(model, jobs[0].tokens)
    waiting = [_row(model, index, job, max_new_tokens) for index, job in enumerate(jobs)][::-1]
    places = places or usual_places(model.device.type)
    batch = _batch(model, source, places, max((len(row.job.tokens) + row.limit for row in waiting), default=0))
    done: dict[int, Continuation] = {}
    ends = set(model.end_tokens)
    while waiting or batch.rows:
        # A quarter of the batch at once: a pass over one prompt costs nearly what it costs over several.
        if waiting and (room := places - len(batch.rows)) >= max(1, places // 4):
            rows = [waiting.pop() for _ in range(min(room, len(waiting)))]
            logits = batch.admit(rows)
        else:
            rows = list(batch.rows.values())
            logits = batch.step()
        for row, token in zip(rows, _chosen(rows, logits, top_p), strict=True):
            if token in ends:
                row.finish_reason = "stop"
            else:
                row.tokens.append(token)
                row.finish_reason = "length" if len(row.tokens) >= row.limit else ""
        done |= {row.index: Continuation(row.tokens, row.finish_reason) for row in batch.drop_finished()}
    return [done[index] for index in range(len(jobs))]


def usual_places(device: str) -> int:
    """Rows at work at once on a device of this type."""
    return _PLACES.get(device, _PLACES_ON_A_GPU)


def width(length: int) -> int:
    """Tokens that a place of a batch for texts of this length holds."""
    return -(-length // _WIDTH) * _WIDTH


def _batch(model: LanguageModel, source: int, places: int, length: int) -> Batch:
    """The model's batch for texts of this length, empty; the one in use before, if it will do."""
    batch = model.kept.get("batch")
    if batch is None or batch.source != source or batch.shape[0] != places or batch.shape[1] < length:
        batch = model.kept["batch"] = Batch(model, source, places, width(length))
    batch.rows = {}
    return batch


def _chosen(rows: list[Row], logits: Tensor, top_p: float) -> list[int]:
    uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in rows])
    temperatures = torch.tensor([row.job.temperature for row in rows], dtype=torch.float32)
    return choose(logits, uniforms, temperatures, top_p).tolist()


def _row(model: LanguageModel, index: int, job: Job, max_new_tokens: int) -> Row:
    limit = min(max_new_tokens, model.max_length - len(job.tokens))
    generator = torch.Generator().manual_seed(job.seed)
    return Row(index, job, torch.rand(limit, generator=generator, dtype=torch.float64), limit)


def choose(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, " batch"],
    temperatures: Float[Tensor, " batch"],
    top_p: float,
) -> Int[Tensor, " batch"]:
    """The token at which the cumulative distribution (in order of token id) passes each uniform number of [0, 1).

    At temperature 0 the likeliest token.
    """
    temperatures = temperatures.to(logits)[:, None]
    greedy = temperatures == 0
    probabilities = (logits / temperatures.masked_fill(greedy, 1)).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    place = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, place, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy[:, 0], logits.argmax(-1), drawn)
