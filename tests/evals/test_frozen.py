"""Frozen attention, against query and key projections replaced by hooks."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melbo_ray.evals import frozen
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import null_of, rows_of, streams
from tests.families import D_MODEL, tiny

ZERO = torch.zeros(D_MODEL)


@contextlib.contextmanager
def projections_of_unsteered(study, tokens):
    """Within the context, the query and key projections put out what they put out unsteered."""
    modules = [part for layer in study.model.layers for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    found = {}
    handles = [
        part.register_forward_hook(lambda module, _args, output: found.update({module: output})) for part in modules
    ]
    streams(study, tokens, ZERO)
    for handle in handles:
        handle.remove()
    kept = dict(found)
    handles = [part.register_forward_hook(lambda module, _args, _output: kept[module]) for part in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_frozen_attention_is_that_of_projections_replaced_by_unsteered_ones(study, chain, implementation):
    study = dataclasses.replace(study)
    study.model.network.set_attn_implementation(implementation)
    tokens, layer = reference.prompt_tokens(study), study.config.target_layer
    plain = streams(study, tokens, ZERO)[layer][1:].mean(0)
    rows = evaluate("frozen", study, chain.take([1]))["frozen"]
    study.model.network.set_attn_implementation("sdpa")
    for kind, theta in (("chain", chain.theta[1]), ("random", null_of(study, 2, chain.norms[1]))):
        for name, context in {
            "free": contextlib.nullcontext(),
            "frozen": projections_of_unsteered(study, tokens),
        }.items():
            (row,) = rows_of(rows, kind=kind, attention=name)
            base = streams(study, tokens, study.base)[layer][1:].mean(0) - plain
            targets = [reference.next_token(study, one) for one in (study.base, ZERO)]
            with context:
                moved = streams(study, tokens, theta)[layer][1:].mean(0) - plain
                here = reference.next_token(study, theta)
            expected = {
                "moved": np.linalg.norm(moved),
                "cos": moved @ base / np.linalg.norm(moved) / np.linalg.norm(base),
                "kl_from_base": reference.kl(here, targets[0]),
                "kl_from_unsteered": reference.kl(here, targets[1]),
            }
            assert {k: row[k] for k in expected} == pytest.approx(expected, abs=2e-4), (kind, name)


def test_without_a_vector_frozen_attention_is_free_and_everything_is_put_back(study):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    rows = evaluate("frozen", study, Vectors("unsteered", [0], ZERO[None]))["frozen"].to_pylist()
    assert [row["kl_from_unsteered"] for row in rows] == pytest.approx([0, 0], abs=1e-6)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize("family", ["bloom", "lfm2", "mamba2"])  # no interface; convolutions between; no attention
def test_a_model_whose_layers_cannot_all_be_frozen_says_so(study, chain, family):
    rows = evaluate("frozen", dataclasses.replace(study, model=tiny(family)), chain)
    assert rows["failures"].num_rows == 0
    assert set(rows["frozen"]["left_out"].to_pylist()) == {frozen.LEFT_OUT}
    assert set(rows["frozen"]["kl_from_base"].to_pylist()) == {None}


@pytest.mark.parametrize("family", ["gemma4-shared", "gpt2", "llama4"])
def test_a_model_whose_layers_all_attend_is_measured(study, chain, family):
    rows = evaluate("frozen", dataclasses.replace(study, model=tiny(family)), chain.take([0]))
    assert rows["failures"].num_rows == 0
    assert {*rows["frozen"]["left_out"].to_pylist()} == {None}
