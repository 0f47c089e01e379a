"""The jobs as a person runs them: as commands, on a Ray of their own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.runs.lease import Lease, holder
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import table
from melbo_ray.runs.storage import Storage
from melbo_ray.runs.work_unit import WHOLE, Unit
from melbo_ray.search.vectors import stored_vectors
from tests.cluster.tiny_study import REPOSITORY, rows, run_here


def test_a_study_ends_with_tables_a_manifest_and_a_summary(undisturbed):
    done, url = undisturbed
    assert done.returncode == 0, done.stderr
    manifest = json.loads((Path(url) / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["concepts"]["code"]["vectors"] == 40
    assert manifest["concepts"]["code"]["stop_reason"] == "num_vectors"
    assert manifest["concepts"]["code"]["max_abs_cos"] <= 1e-6
    assert manifest["concepts"]["code"]["failures"] == 0
    assert not Storage(url).names("stages")
    assert len(manifest["fingerprint"]) == 64
    assert {"torch", "ray", "python"} <= set(manifest["versions"])
    assert manifest["packed"] == {"chain": True, "evaluator": True}
    assert all(2e8 < manifest["peak_memory"][role] < 4e9 for role in ("chain", "evaluator"))
    checks = {
        role: {name for by_name in hosts.values() for name in by_name} for role, hosts in manifest["checks"].items()
    }
    assert checks == {"chain": {"slice"}, "evaluator": {"slice", "logits", "scores", "texts"}}
    rendered = manifest["prompts_rendered"]["code"]
    assert {name: part["text"] for name, part in rendered.items()} == manifest["prompts"]["code"]
    assert len(rendered["training"]["tokens"]) == len("How is code?")
    found = rows(url)
    assert [row["index"] for row in found["code", "vectors"] if row["kind"] == "chain"] != []
    own = [
        (row["kind"], row["index"]) for row in found["code", "kl"] if row["scale"] == "own" and row["kind"] != "random"
    ]
    assert {("base", 0), ("unsteered", 0), *(("chain", i) for i in range(1, 41))} <= set(own)
    assert len(own) == len(set(own))
    assert not Run.open(url).fresh()
    for line in (
        "vectors found",
        "KL below 10 % of unsteered",
        "greedy texts with the concept",
        "largest |cos|",
        "memory at most: chain ",
        "self-check: slice ",
        "results:",
        "report:",
    ):
        assert line in done.stdout


def test_the_audit_is_the_largest_cosine_of_all_pairs(undisturbed):
    _, url = undisturbed
    vectors = stored_vectors(Run.open(url), "code")
    stack = torch.stack([vectors.base.theta, *(vector.theta for vector in vectors.chain)]).double().numpy()
    stack /= (stack**2).sum(1, keepdims=True) ** 0.5
    gram = abs(stack @ stack.T - torch.eye(len(stack)).numpy())
    told = json.loads((Path(url) / "run.json").read_text())["concepts"]["code"]["max_abs_cos"]
    assert told == pytest.approx(gram.max(), rel=1e-3)


def test_the_query_that_is_printed_works_as_pasted(undisturbed):
    done, _ = undisturbed
    command = re.search(r"^query: +(python .*)$", done.stdout, re.M).group(1)
    words = shlex.split(command)
    answer = subprocess.run([sys.executable, *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "kl_from_base" in answer.stdout
    assert "40 rows" in answer.stdout


def test_progress_is_plain_lines_where_there_is_no_terminal(undisturbed):
    done, _ = undisturbed
    assert "code: finding the base vector" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_a_run_killed_and_resumed_is_the_run_that_never_stopped(tiny, tmp_path, undisturbed, cluster):
    """The driver is killed in the middle of its chain, with everything it had started; the rest is done elsewhere."""
    url, command = f"{tmp_path}/run", tiny.command("ortho", str(tmp_path), "run")
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **quiet)
    _wait(lambda: _found(url) >= 5, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert "interrupted" in run_here([sys.executable, "jobs/status.py", url]).stdout
    resumed = run_here(command, **cluster)
    assert resumed.returncode == 0, resumed.stderr
    assert rows(url) == rows(undisturbed[1])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_what_it_has_published_and_the_lease_free(tiny, tmp_path, cluster, stop, code):
    url = f"{tmp_path}/run"
    command = tiny.command("ortho", str(tmp_path), "run", max_evaluations=1000, tolerance=0)
    pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What was started in the background of a shell may ignore SIGINT, and passes that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    driver = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | cluster, **pipe)
    signal.signal(signal.SIGINT, before)
    _wait(lambda: _found(url) >= 2, driver)
    driver.send_signal(stop)
    _, said = driver.communicate(timeout=60)
    assert (driver.returncode, said) == (code, "stopped; the same command resumes\n")
    run = Run.open(url)
    assert run.manifest().status == "interrupted"
    assert holder(run.storage) is None
    assert 0 < len(run.read("vectors", "code")) < 41


def test_a_second_driver_is_refused(tiny, undisturbed):
    _, url = undisturbed
    lease = Lease(Storage(url))
    refused = run_here(tiny.command("ortho", str(Path(url).parent), "run"))
    lease.release()
    assert refused.returncode == 2
    assert re.fullmatch(rf"error: .*another driver \(process {os.getpid()} on .*\n", refused.stderr)


def test_a_longer_chain_with_more_evaluations_goes_on_from_a_shorter_one_and_that_from_a_base(
    tiny, tmp_path, undisturbed, cluster
):
    for job, options in (("melbo", {}), ("ortho", {"num_vectors": 13, "evals": "kl"}), ("ortho", {})):
        done = run_here(tiny.command(job, str(tmp_path), "run", **options), **cluster)
        assert done.returncode == 0, done.stderr
        if job == "melbo":
            assert "→ " in done.stdout
    ours, theirs = rows(f"{tmp_path}/run"), rows(undisturbed[1])
    assert ours["code", "vectors"] == theirs["code", "vectors"]
    assert ours["code", "candidates"] == theirs["code", "candidates"]
    for name in ("kl", "composition", "geometry", "generations"):
        keys = [[(row["kind"], row["index"]) for row in found["code", name]] for found in (ours, theirs)]
        assert keys[0] == keys[1]


def test_another_configuration_is_refused_with_what_differs(tiny, undisturbed):
    _, url = undisturbed
    before = {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")}
    done = run_here(tiny.command("ortho", str(Path(url).parent), "run", radius=4.0, num_vectors=6, eval_batch=4))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "num_vectors was 40 and is 6; radius was 3.0 and is 4.0" in done.stderr
    assert "eval_batch" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")} == before


def test_evaluations_are_added_to_two_concepts_without_doing_any_again_but_those_that_failed(tiny, tmp_path, cluster):
    options = {"concepts": "code,alien", "num_vectors": 3, "evals": "kl"}
    ortho = run_here(tiny.command("ortho", str(tmp_path), "run", **options), **cluster)
    assert ortho.returncode == 0, ortho.stderr
    before = rows(f"{tmp_path}/run", ("code", "alien"))
    report = Path(f"{tmp_path}/run/report.html").read_text()
    written = Path(f"{tmp_path}/run/kl/concept=code/part-kl-00000.parquet").stat().st_mtime_ns
    _fail(f"{tmp_path}/run", Unit("code", "dose", "chain", 1, 3))
    _fail(f"{tmp_path}/run", Unit("code", "geometry", "summary-of-3", 0, 0))
    _fail(f"{tmp_path}/run", Unit("alien", "geometry", WHOLE, 1, 3))  # as earlier releases did it
    later = run_here([sys.executable, "jobs/evaluate.py", f"--run={tmp_path}/run", "--evals=dose,geometry"], **cluster)
    assert later.returncode == 0, later.stderr
    after = rows(f"{tmp_path}/run", ("code", "alien"))
    for concept in ("code", "alien"):
        assert after[concept, "kl"] == before[concept, "kl"]
        assert {row["index"] for row in after[concept, "dose"] if row["kind"] == "chain"} == {1, 2, 3}
        assert before[concept, "dose"] == []
        assert after[concept, "geometry"]
        assert "median_kl" in {row["figure"] for row in after[concept, "summary"]}
        assert after[concept, "failures"] == []
    assert Path(f"{tmp_path}/run/kl/concept=code/part-kl-00000.parquet").stat().st_mtime_ns == written
    assert Path(f"{tmp_path}/run/report.html").read_text() != report
    status = run_here([sys.executable, "jobs/status.py", f"{tmp_path}/run"])
    assert "finished" in status.stdout
    assert "3 of 3" in status.stdout


def _fail(url: str, unit: Unit) -> None:
    """As an evaluator of an earlier driver that could not do it."""
    kind = "chain" if unit.kind == WHOLE else unit.share
    facts = {"run_id": "run", "kind": kind, "evaluation": unit.evaluation, "error": "full", "attempts": 1}
    indices = [0] if unit.kind == WHOLE else range(unit.first, unit.last + 1)
    empty = {name: table(name, []) for name in EVALUATIONS[unit.evaluation].tables}
    Run.open(url).commit(unit, empty | {"failures": table("failures", [facts | {"index": i} for i in indices])})


def _found(url: str) -> int:
    """Vectors of the chain that are durable."""
    return sum(unit.evaluation == "chain" for unit in Run.open(url).fresh()) + len([i for i in _published(url) if i])


def _published(url: str) -> list[int]:
    manifest = Run.open(url).manifest() or Manifest()
    spans = manifest.done.get("code", {}).get("chain", {}).get("chain", [])
    return [i for first, last in spans for i in range(first, last + 1)]


def _wait(true, driver, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert driver.poll() is None, "the driver ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)
