"""The GPU's one command runs to its end where there is none, without what such a machine lacks, and loses no stage."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_checks, gpu_figures
from benchmarks.gpu_checks import CHECKS, Check
from benchmarks.gpu_figures import FIGURES
from benchmarks.reference import Row

ROOT = Path(__file__).parents[2]
LACKING = ["ray", "pydantic", "pydantic_settings", "jaxtyping", "rich", "duckdb", "psutil", "plotly", "gguf", "s3fs"]
WITHOUT = f"""
import importlib.machinery as machinery, runpy, sys
found = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda _, name, *rest: None if name.split(".")[0] in {LACKING} else found(name, *rest)
)
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def test_it_runs_to_its_end_on_the_cpu_without_ray_pydantic_and_jaxtyping(tmp_path):
    command = [sys.executable, "-c", WITHOUT, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "stand-ins for pydantic, pydantic_settings, jaxtyping" in found["title"]
    assert [stage["name"] for stage in found["stages"]] == [*CHECKS, *FIGURES]
    assert {stage["state"] for stage in found["stages"]} == {"done"}
    assert {check["part"] for check in found["checks"]} >= {"self-check", "engines", "resumed", "bfloat16"}
    cases = {figure["case"] for figure in found["figures"]}
    assert {"float32, 4 concepts: usual", "generalization", "4 chains of 1,558, reckoned"} <= cases
    assert all(figure["value"] > 0 for figure in found["figures"])
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {case} |" in table for case in cases)


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr(gpu, "prepare", lambda _tiny: None)


def check(error, fell_back=False):
    return Check("engines", "a case", error, 1e-3, fell_back=fell_back)


def stages(monkeypatch, **functions):
    for name, function in functions.items():
        monkeypatch.setitem(CHECKS, name, function)
    return ["--tiny", "--only", ",".join(functions)]


def test_a_stage_that_fails_keeps_what_it_found_and_the_next_goes_on(prepared, monkeypatch, tmp_path):
    def fails(_lab):
        yield check(1e-4)
        raise RuntimeError("an illegal memory access\nand more")

    chosen = stages(monkeypatch, engines=fails, resumed=lambda _lab: iter([check(0.0)]))
    assert gpu.main([*chosen, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["state"] for stage in found["stages"]] == ["FAILED: RuntimeError: an illegal memory access", "done"]
    assert [row["holds"] for row in found["checks"]] == [True, True]


@pytest.mark.parametrize("wrong", [check(2e-3), check(float("nan")), check(0.0, fell_back=True)])
def test_a_check_that_does_not_hold_is_told_and_ends_in_another_exit_code(prepared, monkeypatch, tmp_path, wrong):
    good = stages(monkeypatch, engines=lambda _lab: iter([check(1e-3)]))
    assert gpu.main([*good, "--out", str(tmp_path)]) == 0
    bad = stages(monkeypatch, engines=lambda _lab: iter([wrong]))
    assert gpu.main([*bad, "--out", str(tmp_path)]) == 1
    assert "**NO**" in (tmp_path / "gpu.md").read_text()


def test_what_takes_too_long_is_stopped_and_what_would_begin_too_late_is_left_out(prepared, monkeypatch, tmp_path):
    def slow(_lab):
        yield Row("step", "first", 1.0, "ms")
        try:
            time.sleep(60)
        except Exception:  # as where an engine that fails is given up
            yield Row("step", "never", 1.0, "ms")

    monkeypatch.setitem(FIGURES, "step", slow)
    report = gpu.Report(tmp_path, "a title")
    report.run("step", slow, None, 0.01)
    assert [row["case"] for row in report.figures] == ["first"]
    assert report.stages[0]["state"] == "stopped after 0 s"
    assert gpu.main(["--tiny", "--only", "step", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert "left out: no time" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_one_line_says_how_to_try_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device: --tiny" in capsys.readouterr().err
    assert gpu.main(["--tiny", "--only", "stpe", "--out", str(tmp_path)]) == 2
    assert "no stage 'stpe'" in capsys.readouterr().err


def test_a_wrong_engine_does_not_hold(monkeypatch):
    lab = gpu.prepare(tiny=True)
    slice, engine = lab.engine(lab.bench.model, 1)
    assert gpu_checks.compared(lab, slice, engine, "right").holds
    monkeypatch.setattr(slice, "_value_and_grad", lambda *inputs: [1.01 * part for part in engine(*inputs)])
    assert not gpu_checks.compared(lab, slice, engine, "wrong").holds
    assert gpu_figures._against(1.31, 1.3).endswith("NOT MET")
    assert gpu_figures._against(31.0, 30.0, least=True).endswith(": met")
