"""Generalisation: whether a vector copies the base's effect on held-out prompts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.kl import fetched
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts, kl, target_log_probs

LENGTH = 16
_COLUMNS = ("kl_from_base", "kl_per_token", "top1_agreement", "log_likelihood_ratio", "concept_score")


@dataclass(frozen=True)
class HeldOut:
    """The prompts, each with two forced continuations: the base's own, and the concept's first.

    Attributes:
        names: prompt ids: the training prompt and the held-out ones, shortest first.
        prompts: the prompts with their continuations.
        targets: those of the prompts, on the device of the logits.
        lengths: tokens of the base's continuation, by prompt.
        base: log-probabilities along the base's continuation under θ₀, (length, vocab) by prompt.
        likeliest: most likely token at each position of `base`, by prompt.
        unsteered: unsteered log-probability of each forced token, by prompt.
    """

    names: list[str]
    prompts: Prompts
    targets: list[Int[Tensor, " _kept"]]
    lengths: list[int]
    base: list[Float[Tensor, "_length vocab"]]
    likeliest: list[Int[Tensor, " _length"]]
    unsteered: list[Float[Tensor, " _kept"]]


def run(study: Study, vectors: Vectors) -> Rows:
    """Evaluate each vector at its own norm on every prompt, teacher-forced along the base's greedy continuation.

    `kl_from_base` is at the prompt's last token, `kl_per_token` and `top1_agreement` are means along the continuation.
    `log_likelihood_ratio` (of the base's continuation) and `concept_score` (of the concept's first continuation) are
    steered minus unsteered, in nats per token.
    """
    study = study.rounded
    held_out = study.once(_held_out)
    keys, figures = [], []
    for index, theta, norm in zip(vectors.index, vectors.theta, vectors.norms, strict=True):
        logits = held_out.prompts.under(theta)
        for prompt, (prompt_id, scores) in enumerate(zip(held_out.names, logits, strict=True)):
            keys.append({"index": index, "prompt_id": prompt_id, "norm": norm})
            figures.append(_compare(held_out, prompt, scores))
    rows = [
        study.row(vectors.kind, **key, **dict(zip(_COLUMNS, values, strict=True)))
        for key, values in zip(keys, fetched(figures), strict=True)
    ]
    return {"generalization": rows}


def _compare(held_out: HeldOut, prompt: int, logits: Float[Tensor, "kept vocab"]) -> Float[Tensor, " columns"]:
    """The `_COLUMNS` of one prompt, on the device of `logits`."""
    length, targets = held_out.lengths[prompt], held_out.targets[prompt]
    # Computed once, because the vocabulary may be large.
    log_p = logits.log_softmax(-1)
    divergence = kl(log_p[:length], held_out.base[prompt])
    agrees = log_p[:length].argmax(-1) == held_out.likeliest[prompt]
    gain = log_p.gather(-1, targets[:, None])[:, 0] - held_out.unsteered[prompt]
    parts = divergence, agrees.float(), gain[:length], gain[length:]
    return torch.stack([divergence[0], *(part.mean() for part in parts)])


def _held_out(study: Study) -> HeldOut:
    # Sorted by length to reduce padding.
    names = sorted([TRAINING, *study.concept.held_out], key=lambda name: len(study.tokens(name)))
    tokens = [study.tokens(name) for name in names]
    written = _continuations(study, tokens)
    forced = [[own, study.continuations[0]] for own in written]
    prompts = Prompts(study.model, tokens, study.config.source_layer, forced)
    lengths = [len(own) for own in written]
    base = prompts.under(study.base)
    unsteered = prompts.under(torch.zeros_like(study.base))
    log_p = [logits[:length].log_softmax(-1) for logits, length in zip(base, lengths, strict=True)]
    likeliest = [rows.argmax(-1) for rows in log_p]
    targets = [own.to(kept.device) for own, kept in zip(prompts.targets, log_p, strict=True)]
    scored = [target_log_probs(logits, own) for logits, own in zip(unsteered, targets, strict=True)]
    return HeldOut(names, prompts, targets, lengths, log_p, likeliest, scored)


def _continuations(study: Study, prompts: list[Int[Tensor, " _seq"]]) -> list[Int[Tensor, " _length"]]:
    """The base's greedy continuation of each prompt; an end token if it is empty."""
    requests = [Request(tokens, study.base, temperature=0) for tokens in prompts]
    texts = generate(study.model, requests, study.config.source_layer, max_new_tokens=LENGTH)
    return [torch.tensor(text.tokens or study.model.end_tokens[:1]) for text in texts]
