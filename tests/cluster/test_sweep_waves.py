"""A sweep such as `studies/why.toml`: one base for all, directions avoided, another study's mean, a kill."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from melbo_ray.runs.run_store import Run
from melbo_ray.search.vectors import stored_vectors
from tests.cluster.tiny_study import CONCEPT, REPOSITORY, run_here

GRID = """
[options]
OPTIONS
base = "FOLDER/why/why.chain-main#/0"
[grid.chain]
main = { base = "melbo", num_vectors = 5 }
longest = { max_norm = "0.5R" }
contrast = { orthogonal_to = "contrast" }
power = { orthogonal_to = "power/3" }
mean = { orthogonal_to = "FOLDER/why/why.chain-main#/mean" }
"""
AVOIDED = {"main": 0, "longest": 0, "contrast": 2, "power": 3, "mean": 1}


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory, cluster):
    """What a sweep left in its folder that was killed while its second wave was under way, and then ran again."""
    folder = tmp_path_factory.mktemp("waves")
    (folder / "code.toml").write_text('contrast = ["abcd", "bcde!"]' + CONCEPT.format(name="code"))
    options = tiny.options(str(folder), "", num_vectors=3, evals="kl,frequency", candidates=2, melbo_steps=2)
    del options["run_id"]
    options["concepts"] = str(folder / "code.toml")
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    (folder / "why.toml").write_text(GRID.replace("OPTIONS", lines).replace("FOLDER", str(folder)))
    command = [sys.executable, "jobs/sweep.py", str(folder / "why.toml")]
    with subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **cluster}, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None and not list(folder.glob("why/why.chain-contrast/**/chain*")):
            time.sleep(0.1)
        job.kill()
    return folder / "why", run_here(command, **cluster)


def test_all_have_one_base_and_each_avoids_what_it_was_told_to(swept):
    folder, done = swept
    assert done.returncode == 0, done.stderr
    stored = {name: stored_vectors(Run.open(f"{folder}/why.chain-{name}"), "code") for name in AVOIDED}
    main = np.array([vector.theta.numpy() for vector in stored["main"].chain])
    assert len(main) == 5
    for name, found in stored.items():
        # A base is scaled to the radius given, which rounds.
        np.testing.assert_allclose(found.base.theta, stored["main"].base.theta, rtol=1e-6, err_msg=name)
        assert len(found.avoided) == AVOIDED[name]
        manifest = json.loads((folder / f"why.chain-{name}/run.json").read_text())
        assert (manifest["status"], manifest["concepts"]["code"]["failures"]) == ("finished", 0)
        assert manifest["concepts"]["code"]["max_abs_cos"] < 1e-6
        assert len(found.chain) == (5 if name == "main" else 3)
    apart = np.array([vector.theta.numpy() for vector in stored["mean"].chain], np.float64)
    mean = main.astype(np.float64).mean(0)
    assert np.abs(apart @ mean / np.linalg.norm(apart, axis=1) / np.linalg.norm(mean)).max() < 1e-5
    assert max(vector.norm for vector in stored["longest"].chain) <= 1.5 * (1 + 1e-6)


def test_the_table_has_a_row_for_each_by_its_name(swept):
    folder, done = swept
    assert "5 studies" in done.stdout
    page = (folder / "report.html").read_text()
    assert all(f"why.chain-{name}/report.html" in page for name in AVOIDED)
