"""One worker for several runs: each finds what a worker of its own finds, on weights that are loaded once."""

import weakref
from typing import Any

import pytest
import torch

from melbo_ray.cluster import shared_worker
from melbo_ray.cluster.shared_worker import Job, SharedWorker
from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.evals.linear import slice_of
from melbo_ray.runs.manifest import Manifest, RenderedPrompt
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.vectors import stored_vectors
from tests.cluster.tiny_study import rows
from tests.families import directions


@pytest.fixture
def job(tiny, tmp_path):
    """(name, options) → a run that has begun, as a worker needs it."""
    concept = load_concept(str(tiny.folder / "code.toml"))

    def call(name, **options):
        asked: Any = tiny.options(str(tmp_path), name, candidates=2, melbo_steps=2) | options
        asked["concepts"] = [asked["concepts"]]
        config = Config(**asked)
        url = f"{tmp_path}/{name}"
        Run.open(url).write_manifest(Manifest(run_id=name))
        return Job(url, name, config, [concept])

    return call


def test_a_run_on_another_runs_worker_is_that_of_a_worker_of_its_own(job):
    first, second = job("a"), job("b", seed=1, source_layer=2, target_layer=4)
    shared = SharedWorker(first.url, first.run_id, first.config, first.concepts, 1, True, None)
    assert shared.ready()["run_id"] == "a"
    registered, more = shared.of_run(second, "find_base", "code")
    while more is not None:
        again, more = shared.of_run(second, "find_base", "code")
        assert again is None
    assert set(registered["checks"]) == {"slice", "logits", "scores", "texts"}
    unit, base = Unit("code", "kl", "base", 0, 0), stored_vectors(Run.open(second.url), "code").base.theta.numpy()
    for each in (first, second):
        again, done = shared.of_run(each, "evaluate", unit, base[None], base, {})
        assert (again, done.failures) == (None, 0)
    alone = job("alone", seed=1, source_layer=2, target_layer=4)
    worker = Worker(alone.url, alone.run_id, alone.config, alone.concepts, 1, True, None)
    while worker.find_base("code") is not None:
        pass
    worker.evaluate(unit, base[None], base, {})
    assert rows(second.url) == rows(alone.url)
    assert rows(first.url)["code", "kl"] not in ([], rows(second.url)["code", "kl"])


def test_few_runs_are_kept_on_one_model_and_each_keeps_its_prompts(job, monkeypatch):
    monkeypatch.setattr(Worker, "ready", lambda self: {"checks": self.run_id})
    jobs = [job(name) for name in "abc"]
    shared = SharedWorker(jobs[0].url, "a", jobs[0].config, jobs[0].concepts, 1, True, None)
    shared.ready()
    kept: Any = object()
    shared._whole["code"] = shared._begun["code"] = kept
    study = shared._study("code", directions(1)[0].numpy())
    slice = weakref.ref(study.once(slice_of))
    prompt = jobs[0].concepts[0].prompt
    text = "How is code, today?"
    tokens = shared.model.tokenizer(text, return_tensors="pt")["input_ids"][0].tolist()
    rendered = {"code": {"training": RenderedPrompt(text=text, tokens=tokens)}}
    manifest = Run.open(jobs[1].url)
    manifest.manifest()
    manifest.write_manifest(Manifest(run_id="b", prompts_rendered=rendered))
    assert [shared.of_run(each, "_peak_memory")[0] for each in jobs] == [None, {"checks": "b"}, {"checks": "c"}]
    assert slice() is None
    assert len(shared._workers) == shared_worker._KEPT
    assert [shared.of_run(each, "_peak_memory")[0] for each in jobs] == [None] * 3  # nobody is checked twice
    assert all(worker.model is shared.model for worker in shared._workers.values())
    assert shared not in shared._workers.values()  # its place among them is lost, and with it what it kept of its run
    assert (shared._studies, shared._whole, shared._begun) == ({}, {}, {})
    shared.of_run(jobs[1], "_peak_memory")
    assert torch.equal(shared.model.tokenize(prompt), torch.tensor(tokens))
