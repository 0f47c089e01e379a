"""Mean differences of activations: between a concept's prompts and neutral ones, or between the prompts of pairs."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.errors import UserError
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.steering import Prompts


def contrast(
    model: LanguageModel, concept: Concept, source: int, system_prompt: str = "default"
) -> Float[Tensor, "2 d_model"]:
    """The mean activation after layer `source` over the `contrast` prompts minus that over the `neutral` prompts.

    A prompt's activation is, in the first row, the mean over its positions except the first, which often is an
    attention sink; in the second row, that of its last position, as in Arditi et al. (2024, "Refusal in language models
    is mediated by a single direction"). Which of them shows a concept depends on model and concept.

    Raises:
        UserError: the concept has no contrast prompts, or a prompt has fewer than two tokens.
    """
    what = f"the contrast of {concept.name!r}"
    shown, neutral = (_mean(model, prompts, source, system_prompt, what) for prompts in prompts_of(concept))
    return shown - neutral


def prompts_of(concept: Concept) -> tuple[list[str], list[str]]:
    """The concept's contrast prompts and its neutral ones.

    Raises:
        UserError: the concept has no contrast prompts.
    """
    if not concept.contrast:
        raise UserError(f"the concept {concept.name!r} has no contrast prompts: add `contrast` to its file")
    return concept.contrast, concept.neutral


def pairs(model: LanguageModel, path: str, source: int, system_prompt: str = "default") -> Float[Tensor, "2 d_model"]:
    """The mean over pairs of the activation under the positive prompt minus that under the negative one.

    A prompt's activation is as in `contrast`, for each of the two rows. `path` is as in `read_pairs`.

    Raises:
        UserError: as `read_pairs`, or a prompt has fewer than two tokens.
    """
    positive, negative = (
        _mean(model, prompts, source, system_prompt, repr(path)) for prompts in zip(*read_pairs(path), strict=True)
    )
    return positive - negative


def read_pairs(path: str) -> list[tuple[str, str]]:
    """The pairs of prompts of a JSONL file, a line each: {"positive": "…", "negative": "…"}.

    Raises:
        UserError: no such file, no pair in it, or a line of another form.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read pairs from {path!r}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            found.append((pair["positive"], pair["negative"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"line {number} of {path!r} is no pair: expected positive and negative, two prompts"
            ) from None
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in found[-1]):
            raise UserError(f"line {number} of {path!r}: positive and negative should be prompts that are not empty")
    if not found:
        raise UserError(f"{path!r} has no pairs: expected a line each, with positive and negative")
    return found


def _mean(
    model: LanguageModel, prompts: Sequence[str], source: int, system_prompt: str, what: str
) -> Float[Tensor, "2 d_model"]:
    tokens = [model.tokenize(prompt, system_prompt) for prompt in prompts]
    if (short := min(zip(tokens, prompts, strict=True), key=lambda pair: len(pair[0])))[0].numel() < 2:
        raise UserError(f"{what} leaves out the first token, and the prompt {short[1]!r} has no other")
    stream = Prompts(model, tokens, source).h_source.float().cpu()
    rows = zip(stream, tokens, strict=True)
    return torch.stack([torch.stack([row[1 : len(ids)].mean(0), row[len(ids) - 1]]) for row, ids in rows]).mean(0)
