"""What a model writes under a vector, greedily, and how sound that is."""

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
from melbo_ray.model.sampling import Job, generate
from melbo_ray.model.steering import Prompts, target_log_probs

# Below this the unsteered model finds a text senseless, nats per token. Readable texts of candidates lie at −0.1 to
# −3.4 on the embedded model and at −0.1 to −2.6 on Qwen2.5-Coder-0.5B; the embedded model's noise at 2 and 4 times R at
# −5.0 to −7.0.
_SENSE = -3.5
# A text with a smaller share of distinct trigrams goes round in circles; the unsteered model finds that likely.
_LOOP = 0.4


@dataclass(frozen=True)
class Written:
    """A greedy text, and how it was judged.

    Attributes:
        text: what the model wrote.
        detected: whether the concept's detector finds it there.
        coherence: mean log-probability per token of the text under the unsteered model, after the same prompt (nats).
        distinct: share of its trigrams of tokens that are distinct, 0 … 1.
    """

    text: str
    detected: bool
    coherence: float
    distinct: float

    @property
    def senseless(self) -> bool:
        """The unsteered model would hardly write it."""
        return not self.coherence >= _SENSE

    @property
    def loops(self) -> bool:
        """It goes round in circles."""
        return self.distinct < _LOOP

    @property
    def sound(self) -> bool:
        """Neither senseless nor a loop."""
        return not (self.senseless or self.loops)

    @property
    def shows(self) -> bool:
        """The concept is there, in a sound text."""
        return self.detected and self.sound


# Under a vector whose logits are not finite.
NOTHING = Written("", False, -inf, 1.0)


def write(
    slice: Slice, concept: Concept, options: AnswerOptions, jobs: Sequence[tuple[Int[Tensor, " _seq"], Tensor]]
) -> list[Written]:
    """The greedy text of each prompt and vector, judged; all in one batch, and one pass for their coherence."""
    model, wanted = slice.model, [Job(prompt, theta, temperature=0) for prompt, theta in jobs]
    texts = [text.tokens for text in generate(model, wanted, slice.source, max_new_tokens=options.max_new_tokens)]
    decoded = [str(model.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in texts]
    pairs = [(tuple(job.tokens.tolist()), tuple(text)) for job, text in zip(wanted, texts, strict=True)]
    # Many candidates write the same, a refusal above all.
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
    """Mean log-probability per token (nats) of each text after its prompt, unsteered; of an empty one its end's."""
    forced = [[torch.tensor(list(tokens) or model.end_tokens[:1])] for tokens in texts]
    rows = Prompts(model, [torch.tensor(prompt) for prompt in prompts], source, forced)
    logits = rows.logits(torch.zeros(len(texts), model.d_model, device=model.device))
    pairs = zip(logits, rows.targets, strict=True)
    return [float(target_log_probs(scores, targets).mean()) for scores, targets in pairs]


def distinct(tokens: Sequence[int]) -> float:
    """The share of trigrams that are distinct: 1 where none comes twice, or there is none."""
    trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
