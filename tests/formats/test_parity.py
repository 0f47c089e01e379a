"""The peers that this environment has steer as melbo_ray does; benchmarks/parity.py asks those of others."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks.parity import table, write_case
from benchmarks.parity_peer import EXPECTED, PEERS, Case, compare


@pytest.fixture(scope="module")
def case(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_case(stored.url, 2, folder, count=8)
    return folder


@pytest.mark.parametrize("peer", [name for name in PEERS if name not in EXPECTED])
def test_a_peer_steers_as_melbo_ray_does(case, monkeypatch, peer):
    module, _, make = PEERS[peer]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed here; docs/parity.md has what it computed in an environment of its own")
    monkeypatch.chdir(case)
    saved = np.load(case / "expected.npz")
    found = compare(Case(case), make(Case(case)), saved["model_logits"], saved["model_greedy"].tolist())
    assert found["difference"] < 1e-4
    assert (found["same"], found["of"]) == (8, 8)


def test_a_peer_that_steers_otherwise_is_seen(case, monkeypatch):
    monkeypatch.chdir(case)
    plain = PEERS["transformers, the sidecar's hook"][2]
    np.save("code-2.npy", np.load("code-2.npy") * 1.5)
    saved = np.load(case / "expected.npz")
    found = compare(Case(case), plain(Case(case)), saved["model_logits"], saved["model_greedy"].tolist())
    np.save("code-2.npy", np.load("code-2.npy") / 1.5)
    assert found["difference"] > 1e-2


def test_the_model_is_handed_over_for_every_release_of_transformers(case):
    config = json.loads((case / "model" / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_the_table_says_what_failed():
    row = {"peer": "a", "version": "1", "transformers": "5", "format": "npy"}
    made = table([row | {"difference": 0.0, "same": 3, "of": 4}, row | {"error": "ValueError: no"}])
    assert "| a | 1 | 5 | npy | 0.0e+00 | 3 of 4 |" in made
    assert "| a | 1 | 5 | npy | ValueError: no | – |" in made
