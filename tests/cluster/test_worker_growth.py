"""A worker keeps the studies of few concepts, and what it does is seen as progress."""

import gc
import weakref

import torch

from melbo_ray.cluster import worker as module
from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals.catalog import BLOCKS
from melbo_ray.evals.jacobian import slice_of
from melbo_ray.evals.linear import Map, best_at_norms
from melbo_ray.host import progress
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts
from melbo_ray.runs import schema
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.chain import chain
from tests.families import directions, tiny

PROMPT = torch.arange(40, 60)


def test_of_many_concepts_a_worker_keeps_the_studies_of_the_latest_two(tmp_path):
    concepts = [Concept(name=f"c{i}", prompt="How are you?", continuations=["def"], words=["def"]) for i in range(9)]
    worker = Worker(str(tmp_path), "run", Config(), concepts, threads=1)
    worker.model = tiny()
    base = directions(1)[0].numpy()
    made = [weakref.ref(worker._study(concept.name, base)) for concept in concepts]
    gc.collect()
    assert [study() is not None for study in made] == [False] * 7 + [True] * 2
    assert worker._study("c7", base) is made[7]()
    assert worker._study("c7", base + 1) is not made[7]()
    assert list(worker._studies) == ["c8", "c7"]


def test_of_searches_begun_a_worker_keeps_the_last_and_none_beside_an_evaluation(tmp_path):
    concepts = [Concept(name=f"c{i}", prompt="How are you?", continuations=["def"], words=["def"]) for i in range(5)]
    options = Config(source_layer=1, target_layer=3, radius=4.0, melbo_steps=12, candidates=3, evals=["kl"])
    worker = Worker(str(tmp_path), "run", options, concepts, threads=1)
    worker.model = tiny()
    for concept in concepts:
        worker.find_base(concept.name)
    assert list(worker._begun) == ["c4"]
    base = directions(1)[0].numpy()
    worker.evaluate(Unit("c0", "kl", "chain", 1, 1), base[None], base, {})
    assert worker._begun == {}


def test_units_of_any_share_share_the_chain_that_the_worker_has_read(tmp_path, monkeypatch):
    concept = Concept(name="c", prompt="How are you?", continuations=["def"], words=["def"])
    options = Config(source_layer=1, target_layer=3)
    worker, base = Worker(str(tmp_path), "run", options, [concept], threads=1), directions(1)[0].numpy()
    worker.model = tiny()
    axes = torch.linalg.qr(directions(3, seed=2).T).Q.T
    facts = dict.fromkeys(schema.SCHEMAS["vectors"].names, 0) | {"run_id": "run", "stop_reason": "converged"}
    for index, theta in enumerate([torch.from_numpy(base), *axes]):
        unit = Unit.vector("c", index) if index else Unit.base("c")
        row = facts | {"kind": unit.kind, "index": index, "vector": theta.tolist()}
        worker.run.commit(unit, {"vectors": schema.table("vectors", [row])})
    read = []
    stored_vectors = module.stored_vectors
    monkeypatch.setattr(module, "stored_vectors", lambda *of: read.append(of) or stored_vectors(*of))
    for kind, item in (("block", 0), ("block", BLOCKS - 1), ("chain-of-3", 1), ("chain-of-3", 3), ("block", 5)):
        name = "hessian" if kind == "block" else "independence"
        worker.evaluate(Unit("c", name, kind, item, item), None, base, {})
    assert len(read) == 1


def test_only_the_study_at_work_keeps_slices_whose_recordings_hold_packed_weights(tmp_path):
    concepts = [Concept(name=f"c{i}", prompt="How are you?", continuations=["def"], words=["def"]) for i in range(2)]
    options = Config(source_layer=1, target_layer=3)
    worker, base = Worker(str(tmp_path), "run", options, concepts, threads=1), directions(1)[0].numpy()
    worker.model = tiny()
    first = worker._study("c0", base)
    slice, radius = weakref.ref(first.once(slice_of)), first.once(lambda study: [study.radius])
    assert worker._study("c0", base).once(slice_of) is slice()
    worker._study("c1", base)
    assert slice() is None
    assert radius in first._made.values()


def test_every_pass_through_a_model_is_progress():
    model, theta = tiny(), directions(1)[0]
    prompts = Prompts(model, [PROMPT], 1)
    options = Config(source_layer=1, target_layer=3, num_vectors=1, max_evaluations=5, max_relative_loss=1e6)
    slice = Slice(model, [PROMPT], 1, 3)
    for work, least in (
        (lambda: list(prompts.logits(theta[None])), 1),
        (lambda: generate(model, [Request(PROMPT, theta)], 1, max_new_tokens=6), 6),
        (lambda: list(chain(slice, theta, options)), 5),
        (lambda: slice.z(theta[None]), 1),
        (
            lambda: best_at_norms(
                Map(torch.eye(len(theta)).double(), theta.double()), torch.zeros(0, len(theta)).double(), [1.0]
            ),
            1,
        ),
    ):
        before = progress.passes
        work()
        assert progress.passes - before >= least
