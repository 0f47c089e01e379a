"""A sweep as a person runs it: several studies as one job, on one pool of evaluators."""

import json
import sys

import pyarrow.parquet as pq
import pytest

from melbo_ray.runs import queries
from melbo_ray.runs.lease import holder
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.storage import Storage
from tests.cluster.tiny_study import run_here

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory, cluster):
    """A sweep of two seeds: its file, its folder, and what it said; and what it says when it is run again."""
    folder = tmp_path_factory.mktemp("sweep")
    options = tiny.options(str(folder), "", num_vectors=3, evals="kl", candidates=2, melbo_steps=2)
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items() if name != "run_id"]
    (folder / "small.toml").write_text("\n".join(["[options]", *lines, "[grid]", f"seed = {list(SEEDS)}"]))
    command = [sys.executable, "jobs/sweep.py", str(folder / "small.toml")]
    return folder / "small", run_here(command, **cluster), run_here(command, RAY_ADDRESS="nowhere:1")


def test_every_cell_is_a_run_and_the_table_compares_them(swept):
    folder, done, _ = swept
    assert done.returncode == 0, done.stderr
    assert "2 of 2 studies finished" in done.stdout
    assert "report:" in done.stdout
    runs = [f"small.seed-{seed}" for seed in SEEDS]
    assert sorted(path.parent.name for path in folder.glob("*/run.json")) == runs
    for run, seed in zip(runs, SEEDS, strict=True):
        manifest = json.loads((folder / run / "run.json").read_text())
        assert (manifest["status"], manifest["seed"]) == ("finished", seed)
        assert set(manifest["checks"]) == {"chain", "evaluator"}
        assert manifest["fingerprint"]
        assert manifest["concepts"]["code"]["vectors"] == 3
        assert manifest["concepts"]["code"]["failures"] == 0
        assert not Run.open(str(folder / run)).fresh()
        assert holder(Storage(str(folder / run))) is None
        assert (folder / run / "report.html").exists()
    table = pq.read_table(folder / "sweep.parquet").to_pylist()
    assert [(row["run_id"], row["seed"], row["vectors"]) for row in table] == [
        (run, str(seed), 3) for run, seed in zip(runs, SEEDS, strict=True)
    ]
    assert "small.seed-1/report.html" in (folder / "report.html").read_text()
    found = queries.connect(str(folder)).sql("SELECT seed, count(*) FROM kl JOIN runs USING (run_id) GROUP BY ALL")
    assert {seed for seed, _ in found.fetchall()} == set(SEEDS)


def test_a_sweep_that_is_finished_takes_no_cluster(swept):
    _, _, again = swept
    assert again.returncode == 0, again.stderr
    assert "2 studies, 2 of them finished before" in again.stdout
    assert "report:" in again.stdout
