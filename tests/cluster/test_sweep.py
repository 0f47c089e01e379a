"""A sweep as a person runs it: several studies as one job, on one pool of evaluators."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from melbo_ray.runs import queries
from tests.cluster.tiny_study import run_here

SEEDS = (0, 1)


def grid(tiny, storage, seeds=SEEDS, **more):
    """The TOML file of a sweep over concepts and seeds."""
    options = tiny.options(str(storage), "run", **{"num_vectors": 3, "evals": "kl,generations"} | more)
    for name in ("run_id", "concepts", "seed"):
        options.pop(name, None)
    concepts = [str(tiny.folder / f"{name}.toml") for name in ("code", "alien")]
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    path = Path(storage) / "small.toml"
    path.write_text(
        "\n".join(["[options]", *lines, "[grid]", f"concepts = {json.dumps(concepts)}", f"seed = {list(seeds)}"])
    )
    return [sys.executable, "jobs/sweep.py", str(path)]


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory, cluster):
    storage = tmp_path_factory.mktemp("sweep")
    return storage, run_here(grid(tiny, storage), **cluster)


def test_every_cell_is_a_run_and_the_table_compares_them(swept):
    storage, done = swept
    assert done.returncode == 0, done.stderr
    assert "4 of 4 studies finished" in done.stdout
    folder = storage / "small"
    runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
    assert runs == [f"small.concepts-{concept}.seed-{seed}" for concept in ("alien", "code") for seed in SEEDS]
    for run in runs:
        manifest = json.loads((folder / run / "run.json").read_text())
        assert manifest["status"] == "finished"
        assert set(manifest["checks"]) == {"chain", "evaluator"}
        assert manifest["fingerprint"]
        assert (folder / run / "report.html").exists()
    table = pq.read_table(folder / "sweep.parquet").to_pylist()
    assert [(row["concept"], row["seed"], row["vectors"]) for row in table] == [
        (concept, str(seed), 3) for concept in ("code", "alien") for seed in SEEDS
    ]
    assert "small.concepts-code.seed-1/report.html" in (folder / "report.html").read_text()
    found = queries.connect(str(folder)).sql("SELECT DISTINCT run_id FROM kl").fetchall()
    assert len(found) == 4
