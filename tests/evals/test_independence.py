"""Profiles of cosines and what ablation changes of them, against hooks of the test's own."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import independence
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.architecture import stream, with_stream
from tests.evals import reference
from tests.evals.reference import null_of, profile, rows_of
from tests.families import D_MODEL

ZERO = torch.zeros(D_MODEL)


def ablated(study, tokens, unit):
    """The unsteered stream's last token at every layer after the source, each without its component along `unit`."""
    unit, found = torch.as_tensor(unit).float(), []

    def project(_layer, _args, output):
        h = stream(output)
        h = h - (h @ unit)[..., None] * unit
        found.append(h[0, -1].double().numpy())
        return with_stream(output, h)

    handles = [layer.register_forward_hook(project) for layer in study.model.layers[study.config.source_layer :]]
    with torch.no_grad():
        study.model.network(tokens[None])
    for handle in handles:
        handle.remove()
    return np.stack(found)[1:]


def rms_of(study, out, other):
    """The rms change of the profile of `other` without `out`, and the rms of the profile."""
    prompts = [reference.prompt_tokens(study, text) for text in (None, *study.concept.held_out.values())]
    plain = np.stack([profile(ablated(study, tokens, ZERO), other) for tokens in prompts])
    changed = np.stack([profile(ablated(study, tokens, out / out.norm()), other) for tokens in prompts])
    return np.sqrt(((changed - plain) ** 2).mean()), np.sqrt((plain**2).mean())


def test_the_change_of_a_profile_is_that_of_plain_transformers(study, chain):
    rows = evaluate("independence", study, chain)["independence"]
    nulls = torch.stack([null_of(study, n, chain.norms[n - 1]) for n in chain.index])
    own = chain.theta[2]
    for kind, theta in (("chain", chain.theta), ("random", nulls)):
        pairs = {
            "vector": (theta[2], study.base),
            "base": (study.base, theta[2]),
            "previous": (theta[1], own),
            "next": (theta[3], own),
        }
        for name, (out, other) in pairs.items():
            (row,) = rows_of(rows, kind=kind, index=3, ablated=name)
            assert (row["change"], row["profile"]) == pytest.approx(rms_of(study, out, other), abs=1e-5), (kind, name)


def test_a_pair_of_neighbours_is_measured_both_ways_and_the_ends_have_one(study, chain):
    rows = evaluate("independence", study, chain)["independence"]
    for kind in ("chain", "random"):
        ablated_of = {n: [row["ablated"] for row in rows_of(rows, kind=kind, index=n)] for n in chain.index}
        assert ablated_of[1] == ["vector", "base", "next"]
        assert ablated_of[3] == ["vector", "base", "previous", "next"]
        assert ablated_of[5] == ["vector", "base", "previous"]


def test_a_single_vector_has_its_pair_with_the_base_and_none_has_a_pair_with_itself(study, chain):
    rows = evaluate("independence", study, chain.take([0]))["independence"].to_pylist()
    assert [(row["kind"], row["ablated"]) for row in rows] == [
        (kind, name) for kind in ("chain", "random") for name in ("vector", "base")
    ]


def test_what_is_ablated_is_ablated_once_for_all_of_its_pairs(study, chain, monkeypatch):
    asked = []
    real = independence.last_tokens
    monkeypatch.setattr(independence, "last_tokens", lambda *args: asked.append(args) or real(*args))
    evaluate("independence", dataclasses.replace(study), chain)
    assert len(asked) == 2 + 2 * len(chain)  # unsteered, without the base; each vector, each random direction
