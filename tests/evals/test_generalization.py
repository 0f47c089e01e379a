import numpy as np
import pytest
import torch

from melbo_ray.evals.context import Vectors
from melbo_ray.evals.generalization import LENGTH
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import rows_of


def greedy(study, prompt, theta):
    """What the base writes: the likeliest token of a plain forward pass, again and again."""
    tokens, written = prompt, []
    while len(written) < LENGTH:
        token = int(reference.log_probs(study, torch.cat([tokens, torch.tensor(written).long()]), theta)[-1].argmax())
        if token in study.model.end_tokens:
            break
        written.append(token)
    return written


def test_every_figure_is_that_of_plain_forward_passes(study, chain):
    table = evaluate("generalization", study, chain)["generalization"]
    prompts = {"training": study.concept.prompt, **study.concept.held_out}
    zero = torch.zeros_like(study.base)
    concept = study.model.tokenizer(study.concept.continuations[0])["input_ids"]
    assert table.num_rows == len(chain) * len(prompts)
    for row in table.to_pylist():
        theta, prompt = chain.theta[row["index"] - 1], reference.prompt_tokens(study, prompts[row["prompt_id"]])
        own = greedy(study, prompt, study.base)
        here, likelihood = reference.forced(study, prompt, own, theta)
        base, _ = reference.forced(study, prompt, own, study.base)
        kls = [reference.kl(p, q) for p, q in zip(here, base, strict=True)]
        gain = [reference.forced(study, prompt, concept, vector)[1].mean() for vector in (theta, zero)]
        expected = {
            "norm": float(theta.norm()),
            "kl_from_base": kls[0],
            "kl_per_token": np.mean(kls),
            "top1_agreement": np.mean(here.argmax(-1) == base.argmax(-1)),
            "log_likelihood_ratio": (likelihood - reference.forced(study, prompt, own, zero)[1]).mean(),
            "concept_score": gain[0] - gain[1],
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-4)


def test_the_base_generalizes_perfectly_and_no_vector_gains_nothing(study):
    for row in evaluate("generalization", study, Vectors("base", [0], study.base[None]))["generalization"].to_pylist():
        assert (row["kl_per_token"], row["top1_agreement"]) == pytest.approx((0, 1), abs=1e-5)
    zero = Vectors("unsteered", [0], torch.zeros_like(study.base)[None])
    for row in rows_of(evaluate("generalization", study, zero)["generalization"]):
        assert (row["log_likelihood_ratio"], row["concept_score"]) == pytest.approx((0, 0), abs=1e-5)
