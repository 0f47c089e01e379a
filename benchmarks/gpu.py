"""Everything that a GPU has to show, in one command of at most ten minutes: correctness first, then figures.

python benchmarks/gpu.py                  # random weights of Qwen1.5-1.8B's shape on the first CUDA device
python benchmarks/gpu.py --tiny           # a tiny model, on the CPU where there is no CUDA: whether all stages run
python benchmarks/gpu.py --minutes 5 --out folder --only "engines,step"

Needs torch, transformers, numpy and pyarrow; no Ray, and nothing is downloaded. Every stage is guarded: what stops it
is told, and the others go on. gpu.json and gpu.md are written after each. The exit code is 1 if a check does not hold
or a stage failed.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
# As a script this folder is searched first, and its modules have common names.
sys.path[:] = [ROOT, *(place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent.resolve())]

SHAPE = "qwen1.5-1.8b"


class _Late(BaseException):
    """The time of a stage is up; no Exception, so that no engine takes it for its own failure."""


@contextlib.contextmanager
def within(seconds: float) -> Generator[None]:
    """Within the context, `_Late` is raised after so many seconds."""

    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(tiny: bool) -> Any:
    """The models, prompts and options that all stages share (`gpu_checks.Lab`)."""
    import copy

    import torch

    from benchmarks.gpu_checks import CONCEPTS, Lab
    from benchmarks.reference import Bench
    from benchmarks.shapes import random_model
    from melbo_ray.concepts.loader import load_concept
    from melbo_ray.config import Config
    from melbo_ray.model.language_model import LanguageModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model("least" if tiny else SHAPE, device)
    rounded = LanguageModel.wrap(copy.deepcopy(model.network).to(torch.bfloat16), model.tokenizer, name=model.name)
    concept = load_concept("code")
    held_out = [*concept.held_out.values()][: CONCEPTS - 1]
    prompts = [model.tokenize(text) for text in (concept.prompt, *held_out)]
    # A tenth of the stream's norm: weights are random, so there is nothing to calibrate.
    radius = 3.0 if tiny else 30.0
    small: dict[str, Any] = {"max_new_tokens": 4, "held_out_generations": 1, "source_layer": 1, "target_layer": 2}
    config = Config(radius=radius, max_relative_loss=1e9, min_norm=0.0, **(small if tiny else {}))
    draw = torch.randn(model.d_model, generator=torch.Generator().manual_seed(9))
    bench = Bench(model, prompts[0], draw / draw.norm() * radius, config, 1 if tiny else 15, quick=tiny)
    return Lab(bench, rounded, concept, prompts)


class Report:
    """What the stages found, written as it comes in."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.stages: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, stage: Callable[[Any], Any], lab: Any, seconds: float) -> None:
        """Run a stage for at most so many seconds; what it found before it was stopped is kept."""
        begin, state = time.monotonic(), "done"
        try:
            with within(seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for found in stage(lab):
                    self.add(found)
        except _Late:
            state = f"stopped after {seconds:.0f} s"
        except Exception as error:
            state = f"FAILED: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        self.stages.append({"name": name, "seconds": round(time.monotonic() - begin, 2), "state": state})
        print(f"{name}: {state}, {self.stages[-1]['seconds']} s", flush=True)
        self.write()

    def add(self, found: Any) -> None:
        """Take in a check or a figure."""
        row = dataclasses.asdict(found)
        if hasattr(found, "holds"):
            self.checks.append(row | {"holds": found.holds})
        else:
            self.figures.append(row)

    @property
    def holds(self) -> bool:
        """Whether every check holds and every stage came to its end, or to that of its time."""
        failed = any(stage["state"].startswith("FAILED") for stage in self.stages)
        return all(check["holds"] for check in self.checks) and not failed

    def write(self) -> None:
        """gpu.json and gpu.md."""
        parts = {"title": self.title, "stages": self.stages, "checks": self.checks, "figures": self.figures}
        (self.folder / "gpu.json").write_text(json.dumps(parts, indent=1, default=str), "utf-8")
        (self.folder / "gpu.md").write_text(self.table(), "utf-8")

    def table(self) -> str:
        """The report as people read it."""
        lines = [self.title, "", "| check | case | error | at most | holds | note |", "|---|---|--:|--:|---|---|"]
        for row in self.checks:
            numbers = f"{row['error']:.2g} | {row['tolerance']:.2g} | {'yes' if row['holds'] else '**NO**'}"
            lines.append(f"| {row['part']} | {row['case']} | {numbers} | {row['note'][:120]} |")
        lines += [
            "",
            "| figure | case | value | unit | × reference | × limit | note |",
            "|---|---|--:|---|--:|--:|---|",
        ]
        for row in self.figures:
            ratios = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("times_reference", "times_limit")]
            cells = [row["part"], row["case"], f"{row['value']:.4g}", row["unit"], *ratios, row["note"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {stage['name']}: {stage['state']} ({stage['seconds']} s)" for stage in self.stages)]
        return "\n".join(lines) + "\n"


def title(missing: list[str], tiny: bool) -> str:
    """What was measured, and on what machine, in a line."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    without = f"; stand-ins for {', '.join(missing)}" if missing else ""
    shape = "a tiny shape" if tiny else f"{SHAPE}'s shape"
    return (
        f"random weights of {shape}, {machine}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores{without}"
    )


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and on the CPU where there is no CUDA")
    parser.add_argument("--minutes", type=float, default=9.0, help="stages that would begin later are left out")
    parser.add_argument("--only", default="", help="stages, comma-separated; by default all")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json and gpu.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that fit in the time; the exit code."""
    begin, chosen = time.monotonic(), options(arguments)
    try:
        import torch
        import transformers  # noqa: F401 - said here if it is missing
    except ImportError as error:
        print(f"error: {error.name} is not installed: this needs torch, transformers, numpy, pyarrow", file=sys.stderr)
        return 2
    if not chosen.tiny and not torch.cuda.is_available():
        print("error: there is no CUDA device: --tiny tries all stages on the CPU", file=sys.stderr)
        return 2
    from benchmarks import stand_ins

    missing = stand_ins.install()
    from benchmarks.gpu_checks import CHECKS
    from benchmarks.gpu_figures import FIGURES

    stages = {**CHECKS, **FIGURES}
    wanted = [name for name in chosen.only.split(",") if name] or list(stages)
    if unknown := set(wanted) - stages.keys():
        print(f"error: no stage {min(unknown)!r}: expected some of {'; '.join(stages)}", file=sys.stderr)
        return 2
    report = Report(chosen.out, title(missing, chosen.tiny))
    print(report.title, flush=True)
    lab = prepare(chosen.tiny)
    for name in wanted:
        left = 60 * chosen.minutes - (time.monotonic() - begin)
        if left <= 1:
            report.stages.append({"name": name, "seconds": 0.0, "state": "left out: no time"})
            continue
        report.run(name, stages[name], lab, left)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report.write()
    print(report.table())
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
