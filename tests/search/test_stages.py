"""The search for the base is interrupted after any stage, and another worker continues it: nothing changes."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.model.residual_slice import Slice
from melbo_ray.runs.storage import Storage
from melbo_ray.search.base_vectors import base_search, base_vector
from melbo_ray.search.stages import Kept
from tests.families import tiny

CONCEPT = Concept(
    name="letters", prompt="a prompt of bytes", continuations=["xyz", "uvw"], words=["x"], contrast=["xxxx", "xyxy"],
    neutral=["abcd", "bcda e"], held_out={"one": "dcba", "two": "e bcd"}, neutral_texts=[],
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "source_layer": 1, "target_layer": 3, "radius": 4.0, "candidates": 5, "max_new_tokens": 4, "melbo_steps": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def some_texts_show_it(monkeypatch):
    """Every stage has something to do: texts with an even sum of characters show the concept."""
    monkeypatch.setattr("melbo_ray.search.written._SENSE", -math.inf)
    monkeypatch.setattr("melbo_ray.search.written._LOOP", 0.0)
    shows = lambda _concept, text: {"detected": sum(map(ord, text)) % 2 == 0}  # noqa: E731
    monkeypatch.setattr("melbo_ray.search.written.score_text", shows)


def search(config):
    slice_ = Slice(tiny(), [tiny().tokenize(CONCEPT.prompt)], source=1, target=3)
    return slice_, CONCEPT, config


def assert_same(found, expected):
    assert torch.equal(found.theta, expected.theta)
    assert torch.equal(found.avoided, expected.avoided)
    assert found.shares == expected.shares
    assert found.calibration == expected.calibration
    for one, other in zip(found.candidates, expected.candidates, strict=True):
        rows = [{k: v for k, v in c.row().items() if k != "vector"} for c in (one, other)]
        assert rows[0] == rows[1]
        np.testing.assert_array_equal(one.theta, other.theta)
        assert (one.weaker, one.held_out) == (other.weaker, other.held_out)


def kept(tmp_path, config):
    return Kept(partial(base_search, *search(config)), Storage(str(tmp_path)), "stages/letters")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"radius": "auto"},
        {"base": "contrast"},
        {"base": "promotion"},
        {"base_index": 2},
        {"base": "power"},
        {"melbo_start": "power"},
        {"orthogonal_to": "power/2"},
    ],
)
def test_a_search_of_which_every_stage_has_a_worker_of_its_own_finds_the_same_to_the_bit(tmp_path, options):
    config = Config(**OPTIONS | options)
    told = []
    while (done := (worker := kept(tmp_path, config)).advance()) is not None:
        told.append(done)
    assert_same(worker.found, base_vector(*search(config)))
    assert len(told) == len(Storage(str(tmp_path)).names("stages")) >= 4 - 2 * ("base" in options)
    assert any("held-out" in line for line in told)


def test_two_workers_may_take_turns_and_no_stage_is_computed_twice(tmp_path):
    config = Config(**OPTIONS)
    one, other = kept(tmp_path, config), kept(tmp_path, config)
    told = []
    while (done := one.advance()) is not None:
        told.append(done)
        one, other = other, one
    assert len(told) == len(set(told)) == len(Storage(str(tmp_path)).names("stages"))
    assert_same(one.found, base_vector(*search(config)))


def test_of_two_workers_at_one_stage_the_first_to_store_it_counts(tmp_path, monkeypatch):
    storage, values = Storage(str(tmp_path)), iter([1.0, 2.0])

    def stages(once):
        value = once("one", lambda: next(values))
        yield f"{value:g}"
        return value

    slow, quick = Kept(stages, storage, "stages"), Kept(stages, storage, "stages")
    get = storage.get

    def overtaken(name):
        monkeypatch.setattr(storage, "get", get)
        found = get(name)
        assert quick.advance() == "1"
        return found

    monkeypatch.setattr(storage, "get", overtaken)
    assert slow.advance() == "1"
    assert slow.advance() is None
    assert slow.found == 1.0
