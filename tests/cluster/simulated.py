"""Workers that sleep where real ones compute, for what is asked of the driver alone. Everything else is real.

Each is a process of its own, of which tests start dozens: this module loads neither torch nor transformers.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import pyarrow as pa

from melbo_ray.config import Config
from melbo_ray.runs import schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit

D_MODEL = 8
BASE = Unit.base("code")
ROW = dict.fromkeys(schema.SCHEMAS["vectors"].names) | {"run_id": "run", "vector": [1.0] * D_MODEL, "norm": 1.0}


class Event(StrEnum):
    """What happens to simulated workers: units kill and linger, and weights are others, always; the rest once a run."""

    UNIT_KILLS = auto()
    UNIT_LINGERS = auto()
    UNIT_HANGS = auto()
    UNIT_BREAKS_GPU = auto()
    CHAIN_DIES = auto()
    CHAIN_DIES_EARLY = auto()  # when its base is stored and not yet answered
    BASE_FINDER_DIES = auto()  # when it has stored it
    CHAIN_HAS_OTHER_WEIGHTS = auto()


@dataclass(frozen=True)
class Script:
    """What simulated workers do; they read it from their run.

    Attributes:
        seconds: that an evaluation takes.
        together: workers of which none is ready before all are.
        stages: of the search for the base, each of which kills its first worker.
        events: what happens.
        unit: the name of the unit to which events of a unit happen.
    """

    seconds: float = 0.0
    together: int = 0
    stages: int = 0
    events: tuple[Event, ...] = ()
    unit: str | None = None

    def write(self, run: Run) -> None:
        run.storage.put("script.json", json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, run: Run) -> Self:
        stored = json.loads(run.storage.get("script.json") or b"{}")
        return cls(events=tuple(Event(name) for name in stored.pop("events", ())), **stored)


class Sleeper:
    """A `work.Worker` to the driver, which does what the `Script` of the run says."""

    def __init__(
        self,
        url: str,
        run_id: str,
        config: Config,
        concepts: Sequence[object],
        threads: int,
        whole: bool,
        packed: bool,
    ) -> None:
        self.device, self.whole, self.broken = config.device, whole, False
        self.run, self.run_id, self.url = Run.open(url), run_id, Path(url)
        self.script = Script.read(self.run)

    def ready(self) -> dict[str, object]:
        """Not before as many are as the script says."""
        (self.url / f"ready-{os.getpid()}").touch()
        while self._ready() < self.script.together:
            time.sleep(0.1)
        if not self.whole and self._happens(Event.CHAIN_DIES_EARLY):
            while self.run.storage.get(BASE.name) is None:
                time.sleep(0.1)
            os._exit(1)
        other = not self.whole and Event.CHAIN_HAS_OTHER_WEIGHTS in self.script.events
        fingerprints = {"lower_fingerprint": "others" if other else "ours"}
        role = "evaluator" if self.whole else "chain"
        return {"fingerprints": fingerprints, "host": "here", "device": self.device, "role": role, "checks": {}}

    def progress(self) -> int:
        """None: whatever takes long hangs."""
        return 0

    def find_base(self, concept: str) -> str | None:
        done = len(list(self.url.glob("stage-*")))
        if done < self.script.stages:
            if not (tried := self.url / f"tried-{done}").exists():
                tried.touch()
                os._exit(1)
            (self.url / f"stage-{done}").touch()
            return f"stage {done}"
        self.run.commit(BASE, {"vectors": schema.table("vectors", [ROW | {"kind": "base", "index": 0}])})
        # The death of the chain actor is heard first: another has taken its place.
        while Event.CHAIN_DIES_EARLY in self.script.events and self._ready() < 3:
            time.sleep(0.1)
        if self._happens(Event.BASE_FINDER_DIES):
            os._exit(1)
        return None

    def evaluate(
        self, unit: Unit, theta: np.ndarray | None, base: np.ndarray, failed: Mapping[int, int]
    ) -> SimpleNamespace:
        events = self.script.events if unit.name == self.script.unit else ()
        if Event.UNIT_KILLS in events:
            os._exit(1)
        if Event.UNIT_HANGS in events and self._happens(Event.UNIT_HANGS):
            time.sleep(600)
        if Event.UNIT_BREAKS_GPU in events and self._happens(Event.UNIT_BREAKS_GPU):
            self.broken = True
        if self.broken:
            import torch

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if Event.UNIT_LINGERS in events:
            time.sleep(5)
        time.sleep(self.script.seconds)
        self.run.commit(unit, {unit.evaluation: self._rows(unit)})
        return SimpleNamespace(failures=0, peak_memory=1000 + unit.first, host="here", checks={})

    def chains(self, concepts: Sequence[str]) -> Iterator[SimpleNamespace]:
        (self.url / f"share-{time.monotonic_ns()}").write_text(",".join(concepts))
        if self._happens(Event.CHAIN_DIES):
            os._exit(1)
        for concept in concepts:
            yield SimpleNamespace(concept=concept, vector=None, stop_reason="num_vectors", peak_memory=700)

    def _ready(self) -> int:
        """How many have been ready."""
        return len(list(self.url.glob("ready-*")))

    def _happens(self, event: Event) -> bool:
        """Whether the script has it, and it has not happened before to anybody."""
        if event not in self.script.events:
            return False
        with contextlib.suppress(FileExistsError):
            (self.url / f"happened-{event}").touch(exist_ok=False)
            return True
        return False

    def _rows(self, unit: Unit) -> pa.Table:
        empty = dict.fromkeys(schema.SCHEMAS[unit.evaluation].names)
        rows = [
            empty | {"run_id": self.run_id, "kind": unit.kind, "index": i} for i in range(unit.first, unit.last + 1)
        ]
        return schema.table(unit.evaluation, rows)


class SharedSleeper(Sleeper):
    """What a `SharedWorker` is to the fleet; every run notes which processes have evaluated for it."""

    def ready(self) -> dict[str, object]:
        self.known = {self.run_id}
        return super().ready() | {"run_id": self.run_id}

    def of_run(self, job: SimpleNamespace, method: str, *args: object) -> tuple[dict[str, object] | None, object]:
        self.run, self.run_id = Run.open(job.url), job.run_id
        self.script = Script.read(self.run)
        (Path(job.url) / f"by-{os.getpid()}").touch()
        registered = None
        if job.run_id not in self.known:
            self.known.add(job.run_id)
            registered = {
                "fingerprints": {}, "host": "here", "device": self.device, "role": "evaluator",
                "checks": {"slice": {"error": 0.0, "tolerance": 1.0, "compared": 1, "verdict": "agrees"}},
            }  # fmt: skip
        return registered, getattr(self, method)(*args)
