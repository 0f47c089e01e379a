"""The log-probability of a concept's continuations on neutral prompts, against plain transformers, text by text."""

import pytest
import torch

from melbo_ray.evals import frequency
from melbo_ray.evals.context import Chain
from melbo_ray.model.steering import encode


def test_it_is_the_mean_over_all_tokens_after_the_first_eight_neutral_prompts(study, chain):
    (row,) = frequency.run(study, Chain(study.base, chain), "concept", [0])["summary"]
    log_p, model = [], study.model
    for prompt in study.concept.neutral[:8]:
        tokens = model.tokenize(prompt, study.config.system_prompt)
        for text in study.concept.continuations:
            forced = encode(model, text)
            with torch.no_grad():
                logits = model.network(torch.cat([tokens, forced])[None]).logits[0].double()
            after = logits.log_softmax(-1)[len(tokens) - 1 : -1]
            log_p += after[range(len(forced)), forced].tolist()
    assert row["value"] == pytest.approx(sum(log_p) / len(log_p), rel=1e-4)
    assert (row["kind"], row["index"], row["figure"]) == ("unsteered", 0, "neutral_log_prob")
    assert len(study.concept.neutral) > frequency.PROMPTS
