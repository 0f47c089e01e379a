"""Displacements and their cosines, against hooks of the test's own on plain transformers."""

import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.conftest import SOURCE
from tests.evals.reference import cos, null_of, rows_of, streams
from tests.families import D_MODEL, NUM_LAYERS, tiny


def test_displacements_are_those_of_plain_transformers(study, chain):
    tokens = reference.prompt_tokens(study)
    plain = streams(study, tokens, torch.zeros(D_MODEL))
    base = streams(study, tokens, study.base) - plain
    take = {"last": lambda h: h[-1], "mean": lambda h: h[1:].mean(0), "first": lambda h: h[0]}
    rows = evaluate("convergence", study, chain)["convergence"]
    assert rows.num_rows == 2 * 5 * (NUM_LAYERS - SOURCE) * 3
    for kind, theta in (("chain", chain.theta[1]), ("random", null_of(study, 2, chain.norms[1]))):
        moved = streams(study, tokens, theta) - plain
        for row in rows_of(rows, kind=kind, index=2):
            here, there = take[row["position"]](moved[row["layer"]]), take[row["position"]](base[row["layer"]])
            assert row["cos_base"] == pytest.approx(cos(here, there), abs=1e-4)
            assert row["displacement"] == pytest.approx(np.linalg.norm(here), rel=1e-4)
            if row["position"] != "first":
                assert row["vector"] == pytest.approx(here, abs=1e-4)


def test_cosines_at_each_token_are_those_of_plain_transformers(study, chain):
    tokens = reference.prompt_tokens(study)
    plain = streams(study, tokens, torch.zeros(D_MODEL))
    base = streams(study, tokens, study.base) - plain
    rows = evaluate("convergence", study, chain)["token_cosines"]
    assert rows.num_rows == 2 * 5 * (NUM_LAYERS - SOURCE)
    for kind, theta in (("chain", chain.theta[1]), ("random", null_of(study, 2, chain.norms[1]))):
        moved = streams(study, tokens, theta) - plain
        for row in rows_of(rows, kind=kind, index=2):
            expected = [cos(*pair) for pair in zip(moved[row["layer"]], base[row["layer"]], strict=True)]
            assert row["cos_base"] == pytest.approx(expected, abs=1e-4)


def test_at_the_source_nothing_but_the_vector_is_added(study, chain):
    rows = evaluate("convergence", study, chain)["convergence"]
    for row in rows_of(rows, kind="chain", layer=SOURCE, position="last"):
        assert row["vector"] == pytest.approx(chain.theta[row["index"] - 1].numpy(), abs=1e-5)
    for row in rows_of(rows, kind="random", layer=SOURCE, position="last"):
        assert row["cos_base"] == pytest.approx(0, abs=1e-5)


def test_no_vector_displaces_nothing_and_agrees_with_nothing(study):
    zero = Vectors("unsteered", [0], torch.zeros(1, D_MODEL))
    for row in evaluate("convergence", study, zero)["convergence"].to_pylist():
        assert (row["cos_base"], row["displacement"]) == (None, 0)
    for row in evaluate("convergence", study, zero)["token_cosines"].to_pylist():
        assert set(row["cos_base"]) == {None}


@pytest.mark.parametrize("family", ["gemma4-shared", "gpt2", "bloom"])
def test_other_families_are_measured_too(study, chain, family):
    other = dataclasses.replace(study, model=tiny(family))
    assert evaluate("convergence", other, chain.take([0]))["failures"].to_pylist() == []
