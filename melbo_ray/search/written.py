"""Greedy texts under a vector, and their soundness."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Int
from torch import Tensor

from melbo_ray.concepts.detectors import score_text
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import AnswerOptions
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts, target_log_probs

# Coherence below which a text is senseless, nats per token. Readable texts of candidates have −0.1 to −3.4 on the
# embedded model and −0.1 to −2.6 on Qwen2.5-Coder-0.5B; the embedded model's noise at 2 and 4 times R −5.0 to −7.0.
_SENSE = -3.5
# Share of distinct trigrams below which a text loops; the unsteered model finds loops likely, so coherence misses them.
_LOOP = 0.4


@dataclass(frozen=True)
class Written:
    """A greedy text and its judgement.

    Attributes:
        text: the text.
        detected: whether the detector finds the concept in it.
        coherence: mean log-probability per token of the text under the unsteered model, after the same prompt (nats).
        distinct: share of distinct token trigrams, 0 … 1.
    """

    text: str
    detected: bool
    coherence: float
    distinct: float

    @property
    def senseless(self) -> bool:
        """Whether the text is very unlikely under the unsteered model."""
        return not self.coherence >= _SENSE

    @property
    def loops(self) -> bool:
        """Whether the text repeats itself."""
        return self.distinct < _LOOP

    @property
    def sound(self) -> bool:
        """Whether the text is neither senseless nor repetitive."""
        return not (self.senseless or self.loops)

    @property
    def shows(self) -> bool:
        """Whether the text is sound and shows the concept."""
        return self.detected and self.sound


# The text under a vector whose logits are not finite.
NOTHING = Written("", False, -inf, 1.0)


def write(
    slice: Slice, concept: Concept, options: AnswerOptions, requests: Sequence[tuple[Int[Tensor, " _seq"], Tensor]]
) -> list[Written]:
    """Generate and judge the greedy text of each (prompt, vector); texts and coherence are batched."""
    model, wanted = slice.model, [Request(prompt, theta, temperature=0) for prompt, theta in requests]
    texts = [text.tokens for text in generate(model, wanted, slice.source, max_new_tokens=options.max_new_tokens)]
    decoded = [str(model.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in texts]
    pairs = [(tuple(request.tokens.tolist()), tuple(text)) for request, text in zip(wanted, texts, strict=True)]
    # Many candidates give the same text, typically a refusal.
    unlike = list(dict.fromkeys(pairs))
    read = coherence(model, slice.source, *zip(*unlike, strict=True)) if unlike else []
    sense = dict(zip(unlike, read, strict=True))
    return [
        Written(text, score_text(concept, text)["detected"], sense[pair], distinct(tokens))
        for text, pair, tokens in zip(decoded, pairs, texts, strict=True)
    ]


def coherence(
    model: LanguageModel, source: int, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[float]:
    """Mean unsteered log-probability per token of each text after its prompt, nats; for an empty text, of its end."""
    forced = [[torch.tensor(list(tokens) or model.end_tokens[:1])] for tokens in texts]
    rows = Prompts(model, [torch.tensor(prompt) for prompt in prompts], source, forced)
    logits = rows.logits(torch.zeros(len(texts), model.d_model, device=model.device))
    pairs = zip(logits, rows.targets, strict=True)
    return [float(target_log_probs(scores, targets).mean()) for scores, targets in pairs]


def distinct(tokens: Sequence[int]) -> float:
    """The share of distinct trigrams; 1 if there are no trigrams."""
    trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
