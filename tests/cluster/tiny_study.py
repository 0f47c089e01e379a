"""A study that takes seconds: its options, its job in this process, the rows it has written."""

import contextlib
import io
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SCHEMAS

REPOSITORY = Path(__file__).parents[2]
CONCEPT = """
name = "{name}"
prompt = "How is {name}?"
continuations = ["def f", "x = 1"]
words = ["def"]
texts = ["def f(x): return x", "for i in range(3): print(i)"]
neutral_texts = ["The sun is warm.", "A cat sat down."]
[held_out]
one = "Why?"
two = "What now?"
"""


@dataclass(frozen=True)
class Tiny:
    """A model of six layers with random weights, and concepts to match; a study of it takes seconds."""

    folder: Path

    def options(self, storage: str, run_id: str, concepts: str = "code", **options: Any) -> dict[str, object]:
        """Options of a study, by name."""
        files = ",".join(str(self.folder / f"{name}.toml") for name in concepts.split(","))
        return {
            "model": str(self.folder / "model"), "concepts": files, "source_layer": 1, "target_layer": 3, "radius": 3.0,
            "candidates": 3, "melbo_steps": 5, "num_vectors": 40, "max_evaluations": 10, "max_new_tokens": 6,
            "max_relative_loss": 1e6, "min_norm": 0, "device": "cpu",
            "storage": storage, "run_id": run_id, **options,
        }  # fmt: skip

    def command(self, job: str, storage: str, run_id: str, **options: Any) -> list[str]:
        """The command line of a job."""
        named = self.options(storage, run_id, **options)
        return [sys.executable, f"jobs/{job}.py", *(f"--{k.replace('_', '-')}={v}" for k, v in named.items())]


def run_here(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """A job to its end in this process, where nothing is asked of its own: another would load torch and Ray again."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", command[1:])
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(command[1], run_name="__main__")
    return subprocess.CompletedProcess(command, cast(int, end.value.code), out.getvalue(), err.getvalue())


def rows(url: str, concepts: tuple[str, ...] = ("code",)) -> dict[tuple[str, str], list[dict]]:
    """Every row of a run that is published or fresh, without what may differ between runs: their names and times."""
    run, found = Run.open(url), {}
    for concept in concepts:
        for name in SCHEMAS:
            part = run.read(name, concept).drop_columns(["run_id"]).to_pylist()
            for row in part:
                row.pop("seconds", None)
            found[concept, name] = sorted(part, key=lambda row: [repr(value) for value in row.values()])
    return found
