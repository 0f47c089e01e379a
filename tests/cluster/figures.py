"""The figures of the distributed job, each from a run here and now.

python -m tests.cluster.figures [NAME ...]

overhead     what the driver and Ray add to an evaluation batch that takes no time
efficiency   1, 2, 4, 8, 32 evaluators against as many times one, with a simulated time on the GPU
storage      bytes and objects per 1,000 vectors, before and after compaction
startup      from `ray job submit` to the base and to the first vector in storage, on the embedded model
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.memory import Demand, Demands
from melbo_ray.cluster.resources import lay_out
from melbo_ray.config import Config
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs import schema
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from tests.cluster.head import head, submission
from tests.cluster.simulated import D_MODEL, Script, Sleeper
from tests.cluster.tiny_study import REPOSITORY

GPU_SECONDS = 4.0
NO_DEMANDS = Demands(Demand(0, 0, 0, 0, 0), Demand(0, 0, 0, 0, 0))
WORDS = ["def", "return", "model", "steering", "vector", "import", "print", "range", "was", "not", "they", "said"]


def drive(evaluators: int, units: int, seconds: float) -> float:
    """Seconds from when all evaluators are up to when all units are done."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(f"{folder}/run")
        run.storage.put("run.json", b"{}")
        Script(seconds, together=evaluators).write(run)
        config = Config(eval_batch=1, evals=["kl"], min_evaluators=evaluators, max_evaluators=evaluators)
        backlog = Backlog("code", config.evals, 1, {}, stop_reason="num_vectors")
        backlog.add_vector("base", 0, np.ones(D_MODEL, np.float32))
        for index in range(1, units - 1):  # the base and the unsteered model are two more
            backlog.add_vector("chain", index, np.full(D_MODEL, index, np.float32))
        begun: list[float] = []

        def tick(driver: Driver) -> None:
            if not begun and driver.pool.ready == evaluators:
                begun.append(time.perf_counter())

        cluster = {"CPU": 64.0, "memory": 64 << 30}
        Driver(
            run, "run", config, [], {"code": backlog}, lay_out(config, 1, NO_DEMANDS, cluster, {}), tick, Sleeper
        ).drive()
        return time.perf_counter() - begun[0]


def overhead() -> None:
    """Seconds a batch beyond what is computed."""
    taken = drive(evaluators=1, units=600, seconds=0.0)
    print(f"scheduling overhead: {1000 * taken / 600:.1f} ms a batch (one evaluator, 600 batches, local storage)")


def efficiency() -> None:
    """Throughput against evaluators x 1 / GPU time."""
    for evaluators in (1, 2, 4, 8, 32):
        taken = drive(evaluators, units=8 * evaluators, seconds=GPU_SECONDS)
        share = 8 * GPU_SECONDS / taken
        print(f"{evaluators:2} evaluators: {8 * evaluators / taken:5.2f} batches/s, {share:.3f} of linear")


def storage() -> None:
    """A study of 1,000 vectors of d_model 2048 with 32 prompts, committed and published as the driver does."""
    dice, rows = random.Random(0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        run, manifest = Run.open(f"{folder}/run"), Manifest(run_id="run")
        puts = peak = 0
        for first in range(1, 1001, 8):
            for index in range(first, first + 8):
                vector = _facts("vectors", index) | {"vector": rows.standard_normal(2048).astype(np.float32)}
                run.commit(Unit("code", "chain", "chain", index, index), {"vectors": schema.table("vectors", [vector])})
            for name, each in {"kl": 1, "generations": 4, "generalization": 32, "dose": 12, "presence": 4}.items():
                found = [_facts(name, i, dice, j) for i in range(first, first + 8) for j in range(each)]
                run.commit(Unit("code", name, "chain", first, first + 7), {name: schema.table(name, found)})
            puts += 13
            peak = max(peak, len(run.storage.names()))
            if first % 64 == 1:
                run.publish(manifest, lambda: None)
        run.publish(manifest, lambda: None)
        names = run.storage.names()
        size = sum(len(run.storage.get(name) or b"") for name in names)
        print(
            f"1,000 vectors (d_model 2048): {puts} units written, at most {peak} objects at once; after compaction "
            f"{len(names)} objects, {size / 1e6:.1f} MB, of which vectors {_size(run, 'vectors') / 1e6:.1f} MB"
        )


def _size(run: Run, table: str) -> int:
    return sum(len(run.storage.get(name) or b"") for name in run.storage.names(table))


def _facts(table: str, index: int, dice: random.Random = random.Random(0), place: int = 0) -> dict:  # noqa: B008
    values = {
        "string": lambda: f"prompt_{place}", "float": dice.random, "double": dice.random, "int32": lambda: place,
        "int64": lambda: place, "bool": lambda: True, "list<item: float>": lambda: [dice.random() for _ in range(10)],
        "list<item: string>": lambda: dice.sample(WORDS, 10), "list<item: int32>": lambda: [1, 2],
    }  # fmt: skip
    row = {field.name: values[str(field.type).replace("element", "item")]() for field in schema.SCHEMAS[table]}
    keys = {"run_id": "run", "kind": "chain", "index": index}
    return row | keys | ({"text": " ".join(dice.choices(WORDS, k=40))} if table == "generations" else {})


def startup() -> None:
    """Seconds on a head that is up, with the embedded model converted before; the job is otherwise a plain one."""
    LanguageModel.load()
    cache = os.environ.get("XDG_CACHE_HOME") or f"{Path.home()}/.cache"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        patch.setenv("HOME", folder)
        with head() as address:
            url, begun, reached = f"{folder}/runs/run", time.perf_counter(), {}
            command = ["python", "jobs/ortho.py", f"--storage={folder}/runs", "--run-id=run", "--num-vectors=1"]
            job = subprocess.Popen(
                submission(address, [*command, "--evals=kl"]),
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while job.poll() is None and "chain" not in reached:
                found = {unit.evaluation for unit in Run.open(url).fresh()}
                found |= {"manifest"} if Run.open(url).manifest() else set()
                reached |= {name: time.perf_counter() - begun for name in found - reached.keys()}
                time.sleep(0.1)
            job.wait()
    print(
        f"from submission to the driver's manifest {reached['manifest']:.1f} s, to the base (20 candidates) "
        f"{reached['base']:.1f} s, to the first vector of the chain {reached['chain']:.1f} s"
    )


def main() -> None:
    """Those that the command line names, or all."""
    names = sys.argv[1:] or ["overhead", "efficiency", "storage", "startup"]
    if {"overhead", "efficiency"} & set(names):
        ray.init(address="local", num_cpus=64, include_dashboard=False, log_to_driver=False, _memory=64 << 30)
    for name in names:
        globals()[name]()


if __name__ == "__main__":
    main()
