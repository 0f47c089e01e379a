"""The choice of the base: what every candidate writes, how sound that is, and which candidate is taken.

The concept score alone picks badly: it can be highest where the model still refuses, or where it is broken. So a
candidate is judged by its greedy texts, and among those that write the concept by how far it turns the answer: vectors
that follow a base of 3.5 nats stay at 2 % of that, those that follow one of 1 nat fall back to the unsteered answer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import AnswerOptions
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts, continuation_score
from melbo_ray.search.written import NOTHING, Written, write

# A base that only just turns the answer is followed by vectors that do not, and so is one between two regions of noise:
# its effect must outlast weaker doses.
_WEAKER = (0.8, 0.9)
# Nats by which a base should turn the answer, KL(P_unsteered‖P_θ): on Qwen2.5-Coder-0.5B chains from bases above keep
# within 2 to 4 % of that, chains from bases below 1.7 within 12 to 33 %.
_STRONG = 1.8
# So many of those that write the concept, at most, write on so many held-out prompts too.
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
        unsteered_kl: KL(P_unsteered‖P_θ) at the last prompt token (nats), the unsteered KL of a chain from it.
        written: the greedy text on the training prompt.
        weaker: the same under 0.8 θ and 0.9 θ; none where `written` does not show the concept.
        steps: MELBO's steps of ascent until then; None for another base.
        held_out: greedy texts on held-out prompts; only of the best of those that show the concept.
        gained: held-out prompts on which it shows the concept and the unsteered model does not.
        rank: 1 for the best.
        taken: whether it is the base.
        reason: why it was taken or was not, one line.
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
        """It shows the concept, and does under weaker doses too."""
        return self.written.shows and all(text.shows for text in self.weaker)

    @property
    def strong(self) -> bool:
        """It turns the answer so far that vectors which follow it nearly do the same."""
        return self.unsteered_kl >= _STRONG

    @property
    def merit(self) -> tuple[bool, bool, bool, bool, int, float]:
        """Candidates compare by this: shows, firmly; is sound; is strong; on how many other prompts; by how far.

        Where none shows the concept, the concept score decides.
        """
        shows = self.written.shows
        far = self.unsteered_kl if shows else self.concept_score
        far = far if isfinite(far) else -inf
        return shows, self.firm, self.written.sound, shows and self.strong, self.gained, far

    def row(self) -> dict[str, Any]:
        """Its columns of the table `candidates`, keys but `index` aside; texts on held-out prompts where there are."""
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
) -> tuple[list[Candidate], bool]:
    """The candidates in the order of `thetas`, counted from `first`, not ranked yet; whether the unsteered model shows
    the concept, too. The slice's first prompt is the training prompt."""
    model, training = slice.model, slice.prompts[0]
    others = dict.fromkeys([*concept.held_out.values()][:_HELD_OUT])
    held_out = [model.tokenize(text, options.system_prompt) for text in others if text != concept.prompt]
    scores = continuation_score(model, training, concept.continuations, slice.source, thetas).tolist()
    usable = [i for i, score in enumerate(scores) if isfinite(score)]
    zero = torch.zeros(model.d_model)
    unsteered, *texts = write(slice, concept, options, [(training, theta) for theta in (zero, *thetas[usable])])
    written = dict(zip(usable, texts, strict=True))
    # A weaker dose matters only of those that show the concept.
    showing = [i for i, text in written.items() if text.shows]
    weak = iter(write(slice, concept, options, [(training, dose * thetas[i]) for i in showing for dose in _WEAKER]))
    weaker = {i: tuple(itertools.islice(weak, len(_WEAKER))) for i in showing}
    kls = _unsteered_kls(model, training, slice.source, thetas)
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
        texts = write(slice, concept, options, [(prompt, theta) for theta in rows for prompt in held_out])
        plain, *others = (tuple(texts[i : i + len(held_out)]) for i in range(0, len(texts), len(held_out)))
        for candidate, own in zip(best, others, strict=True):
            gained = sum(text.shows and not before.shows for text, before in zip(own, plain, strict=True))
            found[candidate.index - first] = replace(candidate, held_out=own, gained=gained)
    return found, unsteered.shows


def rank(found: Sequence[Candidate], wanted: int | None, unsteered_shows: bool) -> list[Candidate]:
    """The candidates with rank, `taken` and reason; `wanted` takes one whatever its rank."""
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
    """KL(P_unsteered‖P_θ) of each at the prompt's last token, nats."""
    rows = torch.cat([torch.zeros(1, model.d_model), thetas])
    unsteered, *steered = (
        logits[0].double().log_softmax(-1) for logits in Prompts(model, [tokens], source).logits(rows)
    )
    return [float((unsteered.exp() * (unsteered - log_p)).sum()) for log_p in steered]
