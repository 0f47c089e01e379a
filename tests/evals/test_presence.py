import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from melbo_ray.evals.presence import auroc, contrast, effect_size, text_sets
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.search.contrast import contrast as mean_difference
from tests.evals.reference import read, rows_of, without_sinks, written_sets


@pytest.mark.parametrize("sinks", ["kept", "dropped"])
def test_what_is_read_is_recomputed_with_scikit_learn(study, chain, sinks):
    cut = without_sinks if sinks == "dropped" else np.asarray
    concept, neutral = (cut(read(study, texts)) for texts in (study.concept.texts, study.concept.neutral_texts))
    table = evaluate("presence", study, chain)["presence"]
    for index, theta in zip(chain.index, chain.theta.double().numpy(), strict=True):
        unit = theta / np.linalg.norm(theta)
        a, b = concept @ unit, neutral @ unit
        spread = np.sqrt((a.var(ddof=1) * (len(a) - 1) + b.var(ddof=1) * (len(b) - 1)) / (len(a) + len(b) - 2))
        (row,) = rows_of(table, index=index, texts="concept", sinks=sinks)
        expected = {
            "mean_projection": a.mean(),
            "max_projection": a.max(),
            "mean_cos": (a / np.linalg.norm(concept, axis=1)).mean(),
            "effect_size": (a.mean() - b.mean()) / spread,
            "auroc": roc_auc_score([1] * len(a) + [0] * len(b), [*a, *b]),
            "num_tokens": len(a),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
        (other,) = rows_of(table, index=index, texts="neutral", sinks=sinks)
        assert other["mean_projection"] == pytest.approx(b.mean(), abs=1e-4)
        assert (other["effect_size"], other["auroc"]) == (None, None)


def test_ties_count_half():
    a, b = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[2.0], [0.0]])
    assert float(auroc(a, b)) == pytest.approx(roc_auc_score([1, 1, 1, 0, 0], [1, 2, 2, 2, 0]))


def test_effect_size_is_the_distance_in_standard_deviations():
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    assert float(effect_size(3 * noise[:10_000] + 6, 3 * noise[10_000:])) == pytest.approx(2, abs=0.05)


def test_the_contrast_of_a_concept_with_contrast_prompts_is_melbos(study):
    prompts = study.concept.model_copy(update={"contrast": ["Write code.", "Print it in Python."]})
    other = dataclasses.replace(study, concept=prompts)
    over_positions, _ = mean_difference(study.model, prompts, study.config.source_layer)
    assert torch.equal(contrast(other), over_positions)


def test_without_contrast_prompts_it_is_the_mean_difference_of_the_texts(study):
    direction = contrast(study)
    concept, neutral = (without_sinks(read(study, t)) for t in (study.concept.texts, study.concept.neutral_texts))
    np.testing.assert_allclose(direction, concept.mean(0) - neutral.mean(0), atol=1e-4)


def test_massive_activations_and_no_others_are_sinks(study):
    network, (massive,) = copy.deepcopy(study.model.network), study.model.tokenizer("x")["input_ids"]
    with torch.no_grad():
        network.get_input_embeddings().weight[massive] *= 100
    other = dataclasses.replace(study, model=LanguageModel.wrap(network, study.model.tokenizer))
    concept, _ = text_sets(other)[""]
    read = [token for text in study.concept.texts for token in study.model.tokenizer(text)["input_ids"]]
    assert concept.sink.tolist() == [token == massive for token in read]
    assert len(concept.activations("kept")) == len(read)
    assert len(concept.activations("dropped")) == len(read) - read.count(massive) < len(read)


def test_written_sets_differ_in_what_was_forced_and_not_in_the_prompt(study):
    """Both sets again: sampled from plain forward passes on the same prompts, with and without an opening."""
    for found, expected in zip(text_sets(study)["written_"], written_sets(study), strict=True):
        np.testing.assert_allclose(found.h, expected, atol=1e-4)


def test_a_concept_without_passages_is_judged_by_what_the_model_writes(study, chain, monkeypatch):
    bare = dataclasses.replace(study, concept=study.concept.model_copy(update={"texts": []}))
    assert set(evaluate("presence", bare, chain)["presence"]["texts"].to_pylist()) == {
        "written_concept", "written_neutral",
    }  # fmt: skip
    assert contrast(bare).isfinite().all()
