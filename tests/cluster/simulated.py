"""Workers that sleep where real ones compute, for what is asked of the driver alone. Everything else is real.

Each is a process of its own, of which tests start dozens: this module loads neither torch nor transformers.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from melbo_ray.config import Config
from melbo_ray.runs import schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit

D_MODEL = 8
BASE = Unit.base("code")
ROW = dict.fromkeys(schema.SCHEMAS["vectors"].names) | {"run_id": "run", "vector": [1.0] * D_MODEL, "norm": 1.0}


class Sleeper:
    """A `work.Worker` to the driver. An evaluation takes as many seconds as the file `seconds` in the run says;
    `trouble` in the run names a unit and what happens to it: `die` always, `hang` or `break` (its GPU) the first time,
    or `linger`; or it is `other weights`, which the chain has then; or it says what happens the first time: `base dies`
    (a finder of the base, once it has written it), `chain dies early` (before its base is answered) or `chain dies`.
    """

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

    def ready(self) -> dict[str, object]:
        """Where the file `together` says how many, not before as many are."""
        (self.url / f"ready-{os.getpid()}").touch()
        together = self.url / "together"
        while together.exists() and len(list(self.url.glob("ready-*"))) < int(together.read_text()):
            time.sleep(0.1)
        if not self.whole and "chain dies early" in self.trouble and self._first("death"):
            while self.run.storage.get(BASE.name) is None:
                time.sleep(0.1)
            os._exit(1)
        other = not self.whole and self.trouble == "other weights"
        fingerprints = {"lower_fingerprint": "others" if other else "ours"}
        role = "evaluator" if self.whole else "chain"
        return {"fingerprints": fingerprints, "host": "here", "device": self.device, "role": role, "checks": {}}

    def find_base(self, concept: str) -> None:
        self.run.commit(BASE, {"vectors": schema.table("vectors", [ROW | {"kind": "base", "index": 0}])})
        # The death of the chain actor is heard first: another has taken its place.
        while "chain dies early" in self.trouble and len(list(self.url.glob("ready-*"))) < 3:
            time.sleep(0.1)
        if "base dies" in self.trouble and self._first("base"):
            os._exit(1)

    def evaluate(self, unit: Unit, theta: np.ndarray, base: np.ndarray, failed: Mapping[int, int]) -> SimpleNamespace:
        if self.trouble == f"{unit.name} die":
            os._exit(1)
        if self.trouble == f"{unit.name} hang" and self._first("hung"):
            time.sleep(600)
        if self.trouble == f"{unit.name} break" and self._first("break"):
            self.broken = True
        if self.broken:
            import torch

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if self.trouble == f"{unit.name} linger":
            time.sleep(5)
        time.sleep(float((self.url / "seconds").read_text()))
        self.run.commit(unit, {unit.evaluation: self._rows(unit)})
        return SimpleNamespace(failures=0, peak_memory=1000 + unit.first)

    def chains(self, concepts: Sequence[str]) -> Iterator[SimpleNamespace]:
        (self.url / f"share-{time.monotonic_ns()}").write_text(",".join(concepts))
        if self.trouble == "chain dies" and self._first("death"):
            os._exit(1)
        for concept in concepts:
            yield SimpleNamespace(concept=concept, vector=None, stop_reason="num_vectors", peak_memory=700)

    @property
    def trouble(self) -> str:
        file = self.url / "trouble"
        return file.read_text() if file.exists() else ""

    def _first(self, what: str) -> bool:
        """Whether nobody has been here before."""
        with contextlib.suppress(FileExistsError):
            (self.url / f"first-{what}").touch(exist_ok=False)
            return True
        return False

    def _rows(self, unit: Unit) -> pa.Table:
        empty = dict.fromkeys(schema.SCHEMAS[unit.evaluation].names)
        rows = [
            empty | {"run_id": self.run_id, "kind": unit.kind, "index": i} for i in range(unit.first, unit.last + 1)
        ]
        return schema.table(unit.evaluation, rows)
