"""What workers do, in this process and without a driver."""

import itertools
import socket

import numpy as np
import torch

from melbo_ray.cluster.worker import Worker
from melbo_ray.config import Config
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.subspace import max_abs_cos
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.preflight import check
from tests.cluster.tiny_study import rows
from tests.model.test_products import multiplies


def test_a_base_whose_stages_are_done_by_turns_is_that_of_one_worker_and_is_stored_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("melbo_ray.cluster.worker.cores", lambda: 1)
    model, found = LanguageModel.load(str(tiny.folder / "model"), device="cpu"), []
    for count in (1, 2):
        options = tiny.options(str(tmp_path), f"run{count}", melbo_steps=6, candidates=2, max_new_tokens=3)
        checked, url = check(Config(**options)), f"{tmp_path}/run{count}"
        workers = [Worker(url, "run", checked.config, checked.concepts, threads=1) for _ in range(count)]
        for worker in workers:
            vars(worker)["model"] = model  # loaded once for all
        turns = itertools.cycle(workers)
        stages = [*iter(lambda turns=turns: next(turns).find_base("code"), None)]
        assert [unit.name for unit in Run.open(url).fresh()] == ["units/code/base.base.000000-000000.zip"]
        assert workers[-1].find_base("code") is None  # of one that begins late there is nothing left to compute
        found.append((rows(url), stages))
    assert found[0] == found[1]
    assert len(found[0][1]) == len(set(found[0][1])) > 4


@multiplies
def test_a_unit_tells_the_error_of_rounded_products_with_its_own_base(tiny, tmp_path):
    checked = check(Config(**tiny.options(str(tmp_path), "run", eval_products="bfloat16")))
    worker = Worker(f"{tmp_path}/run", "run", checked.config, checked.concepts, threads=1)
    base = np.full(worker.model.d_model, 0.5, np.float32)
    told = worker.evaluate(Unit("code", "kl", "base", 0, 0), base[None], base, {})
    assert (told.failures, told.host, list(told.checks)) == (0, socket.gethostname(), ["products"])
    assert told.checks["products"]["verdict"] == "rounded"
    assert told.checks["products"]["error"] > 0


def test_what_a_chain_avoids_is_stored_with_its_base_and_holds_after_a_kill(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("melbo_ray.cluster.worker.cores", lambda: 1)
    np.save(tmp_path / "avoid.npy", np.eye(64, dtype=np.float32)[:3])
    options = tiny.options(
        str(tmp_path), "run", orthogonal_to=str(tmp_path / "avoid.npy"), num_vectors=4, melbo_steps=5, candidates=2,
        max_new_tokens=3,
    )  # fmt: skip
    model, vectors = LanguageModel.load(str(tiny.folder / "model"), device="cpu"), []
    for number in (1, 2):
        checked, url = check(Config(**options | {"run_id": f"run{number}"})), f"{tmp_path}/run{number}"
        worker = Worker(url, "run", checked.config, checked.concepts, threads=1)
        vars(worker)["model"] = model
        while worker.find_base("code") is not None:
            pass
        if number == 2:  # killed after two vectors, when the file is gone
            list(itertools.islice(worker.chains(["code"]), 2))
            (tmp_path / "avoid.npy").unlink()
            worker = Worker(url, "run", checked.config, checked.concepts, threads=1)
            vars(worker)["model"] = model
        list(worker.chains(["code"]))
        stored = stored_vectors(Run.open(url), "code")
        vectors.append(torch.stack([vector.theta for vector in stored.chain]))
        assert len(stored.avoided) == 3
    assert torch.equal(*vectors)
    units = torch.nn.functional.normalize(vectors[0].double(), dim=-1)
    assert float(units[:, :3].abs().max()) < 1e-6
    assert max_abs_cos(torch.stack([stored.base.theta, *stored.avoided, *vectors[0]])) < 1e-6
