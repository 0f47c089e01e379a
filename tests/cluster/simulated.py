"""Workers that sleep where real ones compute, for what is asked of the driver alone. Everything else is real."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from melbo_ray import tables
from melbo_ray.store import Run, Unit
from melbo_ray.work import Found

D_MODEL = 8


class Sleeper:
    """A `work.Worker` to the driver. An evaluation takes as many seconds as the file `seconds` in the run says;
    `trouble` in the run names a unit and what happens to it: `die` always, `hang` the first time, or `linger`; or it
    is `other weights`, which the chain has then.
    """

    def __init__(
        self, url: str, run_id: str, config: object, concepts: Sequence[object], threads: int, whole: bool
    ) -> None:
        self.whole = whole
        self.run, self.run_id, self.url = Run.open(url), run_id, Path(url)

    def ready(self) -> dict[str, object]:
        """Where the file `together` says how many, not before as many are."""
        (self.url / f"ready-{os.getpid()}").touch()
        together = self.url / "together"
        while together.exists() and len(list(self.url.glob("ready-*"))) < int(together.read_text()):
            time.sleep(0.1)
        trouble = self.url / "trouble"
        other = not self.whole and trouble.exists() and trouble.read_text() == "other weights"
        fingerprints = {"lower_fingerprint": "others" if other else "ours"}
        return {"fingerprints": fingerprints, "host": "here", "device": "none"}

    def evaluate(self, unit: Unit, theta: np.ndarray, base: np.ndarray) -> int:
        trouble = self.url / "trouble"
        if trouble.exists():
            name, what = trouble.read_text().split()
            if name == unit.name and what == "die":
                os._exit(1)
            if name == unit.name and what == "hang" and not (self.url / "hung").exists():
                (self.url / "hung").touch()
                time.sleep(600)
            if name == unit.name and what == "linger":
                time.sleep(5)
        time.sleep(float((self.url / "seconds").read_text()))
        self.run.commit(unit, {unit.evaluation: self._rows(unit)})
        return 0

    def chains(self, concepts: Sequence[str]) -> Iterator[Found]:
        for concept in concepts:
            yield Found(concept, None, "num_vectors")

    def _rows(self, unit: Unit) -> pa.Table:
        empty = dict.fromkeys(tables.SCHEMAS[unit.evaluation].names)
        rows = [
            empty | {"run_id": self.run_id, "kind": unit.kind, "index": i} for i in range(unit.first, unit.last + 1)
        ]
        return tables.table(unit.evaluation, rows)
