"""What workers do, in this process and without a driver."""

import itertools
import socket

import numpy as np

from melbo_ray.cluster.worker import Worker
from melbo_ray.config import Config
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
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
