"""Replaying an exported file on a model: by how much its vectors do something else than their sidecar says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from melbo_ray.errors import UserError
from melbo_ray.formats.reading import read_vectors
from melbo_ray.formats.sidecar import Expected, Sidecar
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.steering import Prompts, kl

# Tokens among which an expected one is sought; one that is not there has a probability of nearly 0.
_SOUGHT = 1000


@dataclass(frozen=True)
class Replayed:
    """A vector of the file on the model.

    Attributes:
        index: its index in the run.
        norm: ‖θ‖ in the file minus that of the sidecar, relative to it.
        probability: largest difference of an expected probability; None where nothing is expected.
        kl: KL(P_n‖P_unsteered) on this model, nats.
        kl_difference: the same minus that of the sidecar; None where nothing is expected.
    """

    index: int
    norm: float
    probability: float | None
    kl: float
    kl_difference: float | None


def sidecar_of(path: str) -> Sidecar:
    """The sidecar beside a file.

    Raises:
        UserError: there is none, or it is malformed.
    """
    told = Sidecar.beside(path)
    if told is None:
        raise UserError(f"{path!r} has no sidecar beside it, so nothing says what its vectors should do")
    return told


def verify(path: str, model: LanguageModel, other_model: bool = False) -> list[Replayed]:
    """Replay the vectors of a file that `export` wrote, read from it in its format, on the prompt of its sidecar.

    `other_model` allows a model of another fingerprint: of another dtype, or fine-tuned.

    Raises:
        UserError: no sidecar, another model, or a file that does not hold what the sidecar says.
    """
    told = sidecar_of(path)
    vectors = read_vectors(path, model.d_model, told.site.layer)
    if len(vectors) != len(told.vectors):
        raise UserError(f"{path!r} holds {len(vectors)} vectors, its sidecar says {len(told.vectors)}")
    if told.site.layer >= len(model.layers):
        raise UserError(f"{path!r} is for layer {told.site.layer}, and the model has {len(model.layers)}, from 0")
    if not other_model and told.model.fingerprint != model.fingerprint():
        raise UserError(
            f"{model.name} is not the model of {path!r}, {told.model.name} ({told.model.dtype}): its fingerprint is "
            "another; --other-model replays it all the same"
        )
    tokens = _tokens(told, path, model)
    rows = torch.cat([torch.zeros(1, model.d_model), vectors]).to(model.device)
    found = [
        logits[0].double().log_softmax(-1).cpu() for logits in Prompts(model, [tokens], told.site.layer).logits(rows)
    ]
    unsteered, steered = found[0], found[1:]
    replayed = []
    for vector, theta, log_p in zip(told.vectors, vectors, steered, strict=True):
        norm = float(theta.norm()) / vector.norm - 1 if vector.norm else float(theta.norm())
        value, expected = float(kl(log_p, unsteered)), vector.expected
        probability = None if expected is None else _furthest(expected, _top(model, log_p))
        difference = None if expected is None else value - expected.kl_from_unsteered
        replayed.append(Replayed(vector.index, norm, probability, value, difference))
    return replayed


def _tokens(told: Sidecar, path: str, model: LanguageModel) -> torch.Tensor:
    vocabulary = model.network.config.get_text_config().vocab_size
    if told.prompt is None or not told.prompt.tokens:
        raise UserError(f"the sidecar of {path!r} has no prompt: it comes from a run of an earlier release")
    if not 0 <= min(told.prompt.tokens) <= max(told.prompt.tokens) < vocabulary:
        raise UserError(f"the prompt of {path!r} has tokens beyond the model's {vocabulary}: it is another model")
    return torch.tensor(told.prompt.tokens)


def _top(model: LanguageModel, log_p: torch.Tensor) -> dict[str, float]:
    """Probabilities by token's text, of several tokens of one text the most likely."""
    top = log_p.topk(min(_SOUGHT, len(log_p)))
    pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    found: dict[str, float] = {}
    for token, probability in pairs:
        found.setdefault(str(model.tokenizer.decode([token])), probability)
    return found


def _furthest(expected: Expected, found: Mapping[str, float]) -> float:
    told: dict[str, float] = {}
    for token, probability in zip(expected.top_tokens, expected.top_probs, strict=False):
        told.setdefault(token, probability)
    return max((abs(probability - found.get(token, 0.0)) for token, probability in told.items()), default=math.nan)
