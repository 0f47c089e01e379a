"""The choice of the base among candidates, by the texts that the model writes under each.

The concept score alone is a poor criterion: it can be highest for a model that still refuses or is broken. Candidates
are therefore judged by their greedy texts, and among those that show the concept by their unsteered KL: vectors of a
chain from a base of 3.5 nats stay at 2 % of that, and those from a base of 1 nat fall back to the unsteered answer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import AnswerOptions
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts, continuation_score, kl
from melbo_ray.search.stages import Once, Stages, compute
from melbo_ray.search.written import NOTHING, Written, write

# A marginal effect, or one between two regions of noise, is lost along the chain; it must persist at weaker doses.
_WEAKER = (0.8, 0.9)
# KL(P_unsteered‖P_θ) of a strong base, nats: on Qwen2.5-Coder-0.5B chains from stronger bases stay within 2 to 4 % of
# it, chains from bases below 1.7 nats within 12 to 33 %.
_STRONG = 1.8
# Maximum number of candidates that are judged on held-out prompts too, and number of these prompts.
_FINALISTS, _HELD_OUT = 5, 3


@dataclass(frozen=True)
class Candidate:
    """A possible base vector.

    Attributes:
        index: position among the candidates.
        theta: (d_model,) float32 on the CPU, of norm R.
        objective: MELBO's objective, the change at the target layer (residual-stream units).
        radius: ‖θ‖ = R (residual-stream units).
        concept_score: mean log-probability per token of the concept's continuations, steered minus unsteered (nats).
        unsteered_kl: KL(P_unsteered‖P_θ) at the last prompt token (nats); the unsteered KL of a chain from this base.
        written: the greedy text on the training prompt.
        weaker: the greedy texts under 0.8 θ and 0.9 θ; empty if `written` does not show the concept.
        steps: number of ascent steps; None for a base other than MELBO's.
        held_out: greedy texts on held-out prompts, for the best of the candidates that show the concept.
        gained: number of held-out prompts on which only the steered model shows the concept.
        rank: rank among all candidates, 1 for the best.
        taken: whether this candidate is the base.
        reason: one line on why it was taken or not.
    """

    index: int
    theta: Float[Tensor, " d_model"]
    objective: float
    radius: float
    concept_score: float
    unsteered_kl: float
    written: Written
    weaker: tuple[Written, ...]
    steps: int | None = None
    held_out: tuple[Written, ...] = ()
    gained: int = 0
    rank: int = 0
    taken: bool = False
    reason: str = ""

    @property
    def firm(self) -> bool:
        """Whether it shows the concept, also under weaker doses."""
        return self.written.shows and all(text.shows for text in self.weaker)

    @property
    def strong(self) -> bool:
        """Whether its unsteered KL is large enough for the chain to keep its effect."""
        return self.unsteered_kl >= _STRONG

    @property
    def merit(self) -> tuple[bool, bool, bool, bool, int, float]:
        """Sort key: shows the concept, firmly, in a sound text, is strong, held-out prompts gained, unsteered KL.

        If no candidate shows the concept, the concept score decides.
        """
        shows = self.written.shows
        far = self.unsteered_kl if shows else self.concept_score
        far = far if isfinite(far) else -inf
        return shows, self.firm, self.written.sound, shows and self.strong, self.gained, far

    def row(self) -> dict[str, Any]:
        """Its row of the table `candidates`, without `run_id` and `kind`."""
        return {
            "index": self.index,
            "vector": self.theta.numpy(),
            "steps": self.steps,
            "objective": self.objective,
            "radius": self.radius,
            "concept_score": self.concept_score,
            "unsteered_kl": self.unsteered_kl if isfinite(self.unsteered_kl) else None,
            "text": self.written.text,
            "weaker_text": self.weaker[0].text if self.weaker else None,
            "firm": self.firm,
            "detected": self.written.detected,
            "coherence": self.written.coherence,
            "distinct_trigrams": self.written.distinct,
            "held_out_texts": [text.text for text in self.held_out] or None,
            "held_out_gained": self.gained if self.held_out else None,
            "rank": self.rank,
            "taken": self.taken,
            "reason": self.reason,
        }


def judge(
    slice: Slice,
    concept: Concept,
    options: AnswerOptions,
    thetas: Float[Tensor, "n d_model"],
    objectives: Sequence[float],
    first: int = 0,
    once: Once = compute,
) -> Stages[tuple[list[Candidate], bool]]:
    """Judge candidates by their texts; also returns whether the unsteered model shows the concept.

    Args:
        slice: the slice, whose first prompt is the training prompt.
        concept: the concept.
        options: system prompt and length of the texts.
        thetas: the candidates.
        objectives: MELBO's objective of each.
        first: index of the first candidate.
        once: keeps the result of every stage.

    Returns:
        The unranked candidates in the order of `thetas`, and whether the unsteered model shows the concept.
    """
    model, training = slice.model, slice.prompts[0]
    others = dict.fromkeys([*concept.held_out.values()][:_HELD_OUT])
    held_out = [model.tokenize(text, options.system_prompt) for text in others if text != concept.prompt]
    these = f"candidates {first} to {first + len(thetas) - 1}"

    def figures() -> tuple[list[float], list[float]]:
        scores = continuation_score(model, training, concept.continuations, slice.source, thetas).tolist()
        return scores, _unsteered_kls(model, training, slice.source, thetas)

    def texts(name: str, requests: Sequence[tuple[Tensor, Tensor]]) -> list[Written]:
        rows = once(f"{first:04d}-{name}", lambda: [astuple(text) for text in write(slice, concept, options, requests)])
        return [Written(*row) for row in rows]

    scores, kls = once(f"{first:04d}-figures", figures)
    yield f"{these} scored"
    usable = [i for i, score in enumerate(scores) if isfinite(score)]
    zero = torch.zeros(model.d_model)
    unsteered, *strong = texts("texts", [(training, theta) for theta in (zero, *thetas[usable])])
    yield f"{these} have written"
    written = dict(zip(usable, strong, strict=True))
    # A weaker dose matters only of those that show the concept.
    showing = [i for i, text in written.items() if text.shows]
    weak = iter(texts("weaker", [(training, dose * thetas[i]) for i in showing for dose in _WEAKER]) if showing else ())
    yield f"{these} have written under weaker doses too"
    weaker = {i: tuple(itertools.islice(weak, len(_WEAKER))) for i in showing}
    found = [
        Candidate(
            first + i, theta, objectives[i], float(theta.norm()), scores[i], kls[i],
            written.get(i, NOTHING), weaker.get(i, ()),
        )
        for i, theta in enumerate(thetas)
    ]  # fmt: skip
    best = sorted((c for c in found if c.written.shows), key=lambda c: c.merit, reverse=True)[:_FINALISTS]
    if best and held_out:
        rows = [zero, *(candidate.theta for candidate in best)]
        every = texts("held-out", [(prompt, theta) for theta in rows for prompt in held_out])
        yield f"{these} have written on held-out prompts too"
        plain, *others = (tuple(every[i : i + len(held_out)]) for i in range(0, len(every), len(held_out)))
        for candidate, own in zip(best, others, strict=True):
            gained = sum(text.shows and not before.shows for text, before in zip(own, plain, strict=True))
            found[candidate.index - first] = replace(candidate, held_out=own, gained=gained)
    return found, unsteered.shows


def rank(found: Sequence[Candidate], wanted: int | None, unsteered_shows: bool) -> list[Candidate]:
    """The candidates with rank, `taken` and reason; `wanted` selects the base by index, whatever its rank."""
    order = sorted(found, key=lambda candidate: candidate.merit, reverse=True)
    taken = order[0].index if wanted is None else wanted
    ranks = {candidate.index: place for place, candidate in enumerate(order, 1)}
    none = "" if order[0].written.shows else f", as does no other of {len(order)}"
    ranked = []
    for candidate in found:
        reason = _verdict(candidate)
        if candidate.written.shows and unsteered_shows:
            reason += "; so does the unsteered model"
        if candidate.index == taken:
            reason = (
                f"taken, {'best of ' + str(len(order)) if wanted is None else 'as --base-index asks'}: {reason}{none}"
            )
        ranked.append(replace(candidate, rank=ranks[candidate.index], taken=candidate.index == taken, reason=reason))
    return ranked


def _verdict(candidate: Candidate) -> str:
    text = candidate.written
    if text.senseless:
        return f"breaks the model: {text.coherence:.1f} nats a token under the unsteered one"
    if text.loops:
        return f"writes in circles: {text.distinct:.0%} of its trigrams are distinct".replace("%", " %", 1)
    if not text.detected:
        return "does not write the concept"
    firmly = "and under 0.8 and 0.9 of it too" if candidate.firm else "but not under 0.8 and 0.9 of it"
    elsewhere = f"newly so on {candidate.gained} of {len(candidate.held_out)} held-out prompts"
    return f"writes the concept, {firmly}, and {elsewhere}; turns the answer by {candidate.unsteered_kl:.1f} nats"


def _unsteered_kls(
    model: LanguageModel, tokens: Int[Tensor, " seq"], source: int, thetas: Float[Tensor, "n d_model"]
) -> list[float]:
    """KL(P_unsteered‖P_θ) of each vector at the prompt's last token, nats."""
    rows = torch.cat([torch.zeros(1, model.d_model), thetas])
    unsteered, *steered = (
        logits[0].double().log_softmax(-1) for logits in Prompts(model, [tokens], source).logits(rows)
    )
    return [float(kl(unsteered, log_p)) for log_p in steered]
