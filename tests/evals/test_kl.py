import numpy as np
import pytest
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.language_model import LanguageModel
from tests.evals import reference
from tests.evals.reference import rows_of
from tests.families import directions


def test_kl_is_that_of_plain_logits_in_float64(study, chain):
    table = evaluate("kl", study, chain)["kl"]
    for index, theta in zip(chain.index, chain.theta, strict=True):
        for scale, scaled in {"own": theta, "radius": theta / theta.norm() * 5}.items():
            (row,) = rows_of(table, index=index, scale=scale)
            assert row["norm"] == pytest.approx(float(scaled.norm()), rel=1e-5)
            expected = reference.divergences(study, scaled)
            assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_the_top_tokens_are_the_likeliest(study, chain):
    (row,) = rows_of(evaluate("kl", study, chain)["kl"], index=1, scale="own")
    probabilities = np.exp(reference.next_token(study, chain.theta[0]))
    order = np.argsort(-probabilities)[:10]
    assert row["top_tokens"] == [study.model.tokenizer.decode([token]) for token in order]
    assert row["top_probs"] == pytest.approx(probabilities[order], abs=1e-4)
    assert row["top1_agrees"] == (order[0] == reference.next_token(study, study.base).argmax())


def test_the_base_is_at_no_distance_from_itself(study):
    for row in evaluate("kl", study, Vectors("base", [0], study.base[None]))["kl"].to_pylist():
        assert (row["kl_from_base"], row["kl_to_base"]) == pytest.approx((0, 0), abs=1e-6)
        assert row["top1_agrees"]


def test_no_vector_is_at_no_distance_from_unsteered_and_has_no_direction_to_rescale(study):
    zero = torch.zeros_like(study.base)
    (row,) = evaluate("kl", study, Vectors("unsteered", [0], zero[None]))["kl"].to_pylist()
    assert row["scale"] == "own"
    assert row["kl_from_unsteered"] == pytest.approx(0, abs=1e-6)
    assert row["kl_from_base"] == pytest.approx(reference.divergences(study, zero)["kl_from_base"], abs=1e-4)


def test_kl_on_the_embedded_model():
    model = LanguageModel.load("smollm2", device="cpu")
    concept = Concept(name="x", prompt="How are you?", continuations=["a"], words=["a"], neutral_texts=[])
    base, *others = directions(3, norm=10.0, d_model=model.d_model)
    study = Study(model, Config(), concept, "run", base)
    table = evaluate("kl", study, Vectors("chain", [1, 2], torch.stack(others)))["kl"]
    for index, theta in enumerate(others, 1):
        (row,) = rows_of(table, index=index, scale="own")
        expected = reference.divergences(study, theta)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
