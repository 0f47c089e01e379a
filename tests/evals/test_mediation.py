"""What is left of an effect without a subspace, against hooks of the test's own on plain transformers."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import mediation
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.architecture import stream, with_stream
from tests.evals import reference
from tests.evals.reference import streams
from tests.families import D_MODEL, tiny


def patched_logits(study, tokens, theta, layer, units):
    """Logits with θ added, and the displacement at `layer` without its components along the rows of `units`."""
    plain = torch.from_numpy(streams(study, tokens, torch.zeros(D_MODEL))[layer]).float()

    def project(_layer, _args, output):
        change = stream(output) - plain
        return with_stream(output, stream(output) - (change @ units.T) @ units)

    def add(_layer, _args, output):
        return with_stream(output, stream(output) + theta)

    handles = [
        study.model.layers[study.config.source_layer].register_forward_hook(add),
        study.model.layers[layer].register_forward_hook(project),
    ]
    with torch.no_grad():
        logits = study.model.network(tokens[None]).logits[0].double().numpy()
    for handle in handles:
        handle.remove()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_what_is_left_without_a_subspace_is_that_of_plain_transformers(study, chain):
    rows = evaluate("mediation", study, chain.take([1]))["mediation"]
    layers = mediation.layers_of(study)
    assert rows.num_rows == len(layers) * (1 + 2 * len(mediation.RANKS) + 1)
    prompt = reference.prompt_tokens(study)
    own = reference.written(study, prompt, study.base, 0, 16, greedy=True) or study.model.end_tokens[:1]
    _, base = prompt, reference.log_probs(study, torch.cat([prompt, torch.tensor(own)]), study.base)
    likeliest = base[len(prompt) - 1 : -1].argmax(-1)
    first = study.model.tokenizer(study.concept.continuations[0], add_special_tokens=False)["input_ids"]
    for row in rows.to_pylist():
        theta = chain.theta[1]
        place = layers.index(row["layer"])
        name = f"{row['subspace']}/{row['rank']}"
        units = torch.zeros(1, D_MODEL) if name == "none/0" else study.once(mediation.subspaces)[place][name]
        assert (units @ units.T).numpy() == pytest.approx(np.eye(len(units)) * (name != "none/0"), abs=1e-5)
        found = patched_logits(study, torch.cat([prompt, torch.tensor(own)]), theta, row["layer"], units)
        expected = {
            "kl_from_base": reference.kl(found[len(prompt) - 1], reference.next_token(study, study.base)),
            "kl_from_unsteered": reference.kl(
                found[len(prompt) - 1], reference.next_token(study, torch.zeros(D_MODEL))
            ),
            "agreement": (found[len(prompt) - 1 : -1].argmax(-1) == likeliest).mean(),
        }
        text = torch.cat([prompt, torch.tensor(first)])
        scores = [
            rows[np.arange(len(prompt) - 1, len(text) - 1), first]
            for rows in (
                patched_logits(study, text, theta, row["layer"], units),
                reference.log_probs(study, text, torch.zeros(D_MODEL)),
            )
        ]
        expected["concept_score"] = (scores[0] - scores[1]).mean()
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=2e-4), row


def test_the_subspaces_are_the_leading_directions_of_the_displacements(study):
    prompt = reference.prompt_tokens(study)
    moved = streams(study, prompt, study.base) - streams(study, prompt, torch.zeros(D_MODEL))
    for layer, named in zip(mediation.layers_of(study), study.once(mediation.subspaces), strict=True):
        expected = np.linalg.svd(moved[layer][1:])[2][:4]
        assert np.abs(named["base/4"].numpy() @ expected.T).max(1) == pytest.approx(np.ones(4), abs=1e-3)


def test_without_its_whole_displacement_a_vector_has_no_effect(study, chain, monkeypatch):
    whole = [{"base/1": torch.eye(D_MODEL)} for _ in mediation.layers_of(study)]
    monkeypatch.setattr(mediation, "subspaces", lambda _: whole)
    for row in evaluate("mediation", study, chain.take([0]))["mediation"].to_pylist():
        if row["subspace"] == "base":
            assert row["kl_from_unsteered"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma4-shared", "gpt2", "bloom"])
def test_other_families_are_measured_too(study, chain, family):
    other = dataclasses.replace(study, model=tiny(family))
    assert evaluate("mediation", other, chain.take([0]))["failures"].to_pylist() == []
