"""How often the unsteered model does what the concept is: the log-probability of its continuations on other prompts."""

from collections.abc import Sequence

import torch

from melbo_ray.evals.context import Chain, Rows, Study
from melbo_ray.model.steering import Prompts, target_log_probs

PROMPTS = 8
"""Number of the concept's neutral prompts that count, from the first."""


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `neutral_log_prob` to `summary`, a figure of the kind `unsteered`, nats per token.

    It is the mean log-probability of the tokens of all continuations of the concept after the first eight neutral
    prompts, unsteered. It counts a common opening word as much as a common behaviour, so it orders concepts roughly.
    """
    tokens = [study.model.tokenize(text, study.config.system_prompt) for text in study.concept.neutral[:PROMPTS]]
    prompts = Prompts(study.model, tokens, study.config.source_layer, [study.continuations] * len(tokens))
    logits = prompts.under(torch.zeros_like(study.base))
    log_p = [target_log_probs(own, targets) for own, targets in zip(logits, prompts.targets, strict=True)]
    value = float(torch.cat(log_p).double().mean())
    return {"summary": [study.row("unsteered", 0, figure="neutral_log_prob", value=value)]}
