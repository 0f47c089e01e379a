"""What is left of an effect without a subspace, against hooks of the test's own on plain transformers."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import mediation
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.architecture import stream, with_stream
from tests.evals import reference
from tests.evals.reference import null_of, streams
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


def displacement(study, theta, layer):
    """What a vector changes at a layer over the prompt, (seq, d_model)."""
    prompt = reference.prompt_tokens(study)
    return streams(study, prompt, theta)[layer] - streams(study, prompt, torch.zeros(D_MODEL))[layer]


def projected_out(study, layer, subspace, rank, null):
    """Rows that span a subspace, by NumPy; of `none` a row of zeros."""
    if subspace == "none":
        return torch.zeros(1, D_MODEL)
    h = displacement(study, null if subspace.startswith("other") else study.base, layer)
    if subspace.endswith("last"):
        return torch.from_numpy(h[-1:] / np.linalg.norm(h[-1])).float()
    return torch.from_numpy(np.linalg.svd(h[study.config.z_from :])[2][:rank]).float()


def test_what_is_left_without_a_subspace_is_that_of_plain_transformers(study, chain):
    rows = evaluate("mediation", study, chain.take([1]))["mediation"].to_pylist()
    theta, null = chain.theta[1], null_of(study, 2, chain.norms[1])
    layers = mediation.layers_of(study)
    cells = [("none", 0), *((name, rank) for name in ("base", "other") for rank in (1, 4)), ("last", 1)]
    cells.append(("other_last", 1))
    found = [(row["layer"], row["subspace"], row["rank"]) for row in rows]
    assert sorted(found) == sorted((layer, *cell) for layer in layers for cell in cells)
    prompt = reference.prompt_tokens(study)
    own = reference.written(study, prompt, study.base, 0, 16, greedy=True) or study.model.end_tokens[:1]
    base = reference.log_probs(study, torch.cat([prompt, torch.tensor(own)]), study.base)
    likeliest = base[len(prompt) - 1 : -1].argmax(-1)
    first = study.model.tokenizer(study.concept.continuations[0], add_special_tokens=False)["input_ids"]
    text = torch.cat([prompt, torch.tensor(first)])
    at = np.arange(len(prompt) - 1, len(text) - 1), first
    unsteered = reference.log_probs(study, text, torch.zeros(D_MODEL))[at]
    ends = [reference.next_token(study, one) for one in (study.base, torch.zeros(D_MODEL))]
    for row in rows:
        units = projected_out(study, row["layer"], row["subspace"], row["rank"], null)
        found = patched_logits(study, torch.cat([prompt, torch.tensor(own)]), theta, row["layer"], units)
        scores = patched_logits(study, text, theta, row["layer"], units)[at]
        expected = {
            "kl_from_base": reference.kl(found[len(prompt) - 1], ends[0]),
            "kl_from_unsteered": reference.kl(found[len(prompt) - 1], ends[1]),
            "agreement": (found[len(prompt) - 1 : -1].argmax(-1) == likeliest).mean(),
            "concept_score": (scores - unsteered).mean(),
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=2e-4), row


def test_only_a_vector_of_the_chain_has_a_null(study):
    for vectors in (Vectors("base", [0], study.base[None]), Vectors("unsteered", [0], torch.zeros(1, D_MODEL))):
        rows = evaluate("mediation", study, vectors)
        assert rows["failures"].num_rows == 0
        assert {*rows["mediation"]["subspace"].to_pylist()} == {"none", "base", "last"}


def test_without_the_direction_of_its_displacement_at_the_last_token_the_base_has_none_there(study):
    for layer, named in zip(mediation.layers_of(study), mediation.of_base(study), strict=True):
        h = displacement(study, study.base, layer)[-1]
        (unit,) = named["last", 1].double().numpy()
        assert h - (h @ unit) * unit == pytest.approx(np.zeros(D_MODEL), abs=1e-3 * float(np.linalg.norm(h)))


def test_without_its_whole_displacement_a_vector_has_no_effect(study, chain, monkeypatch):
    whole = [{("base", 1): torch.eye(D_MODEL)} for _ in mediation.layers_of(study)]
    monkeypatch.setattr(mediation, "subspaces", lambda *_: whole)
    for row in evaluate("mediation", dataclasses.replace(study), chain.take([0]))["mediation"].to_pylist():
        if row["subspace"] == "base":
            assert row["kl_from_unsteered"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma4-shared", "gpt2", "bloom"])
def test_other_families_are_measured_too(study, chain, family):
    other = dataclasses.replace(study, model=tiny(family))
    assert evaluate("mediation", other, chain.take([0]))["failures"].to_pylist() == []
