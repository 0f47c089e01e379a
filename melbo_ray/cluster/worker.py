"""What a machine of the cluster does for a run, without Ray: find a base, run chains, evaluate.

A worker needs nothing but the run's storage and its configuration: whatever it is asked, it makes durable under a name
that depends on the work alone, so any worker can be lost, repeated, or outrun by another.
"""

import contextlib
import dataclasses
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals import runner
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.self_check import selfcheck, take_prompts
from melbo_ray.host import cores, resident_peak
from melbo_ray.model.language_model import BALANCED, LanguageModel
from melbo_ray.model.partial import lower, lower_fingerprint
from melbo_ray.model.residual_slice import Slice
from melbo_ray.runs import schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import WHOLE, Unit
from melbo_ray.search import base_vectors
from melbo_ray.search.chain import chains
from melbo_ray.search.radius import Calibration
from melbo_ray.search.vectors import BaseVector, SteeringVector, row, stored_vectors


@dataclass(frozen=True)
class Found:
    """What a chain reports: a vector, or that it stopped and why; and the most memory its worker has taken, bytes."""

    concept: str
    vector: SteeringVector | None
    stop_reason: str | None = None
    peak_memory: int = 0


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation reports: how many failures it filed; and the most memory its worker has taken, bytes."""

    failures: int
    peak_memory: int


class Worker:
    """One process of a run, with the model loaded when first needed.

    Args:
        url: the run's folder in storage.
        run_id: goes into every row.
        config: the options of the run.
        concepts: the concepts under study.
        threads: torch threads on the CPU; fixed for a worker's life, since results may differ in the last bit.
        whole: load the whole model; a worker that runs chains alone needs its layers up to the target.
        packed: as of `LanguageModel`; the layout says where packed copies fit.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        config: Config,
        concepts: Sequence[Concept],
        threads: int,
        whole: bool = True,
        packed: bool | None = None,
    ) -> None:
        self.run, self.run_id, self.config = Run.open(url), run_id, config
        self.concepts = {concept.name: concept for concept in concepts}
        self.threads, self.whole, self.packed = threads, whole, packed
        self._studies: dict[str, Study] = {}
        torch.set_num_threads(threads)

    @cached_property
    def model(self) -> LanguageModel:
        """The model, spread over the worker's GPUs where it has several; or its lower part."""
        model = dataclasses.replace(self._load(), packed=self.packed)
        if (manifest := self.run.manifest()) is not None:
            take_prompts(model, manifest.prompts_rendered, self.concepts, self.config.system_prompt)
        return model

    def _load(self) -> LanguageModel:
        if not self.whole:
            return lower(self.config)
        return LanguageModel.load(
            self.config.model,
            revision=self.config.revision,
            dtype=self.config.dtype,
            device=self.config.device,
            device_map=BALANCED if (self.config.eval_gpus or 0) > 1 else None,
            trust_remote_code=self.config.trust_remote_code,
            layers=self.config.layers,
        )

    def ready(self) -> dict[str, Any]:
        """Load the model, see the run, check itself; what the manifest says of this worker.

        Raises:
            UserError: the model cannot be loaded, the run's storage is not the driver's, or what `selfcheck` raises.
        """
        if self.run.storage.get("run.json") is None:
            raise UserError(
                f"storage {self.run.storage.url} is not what the driver sees from {socket.gethostname()}: "
                "several machines need an object store or a shared file system"
            )
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {self.threads} threads"
        fingerprints = {"lower_fingerprint": lower_fingerprint(self.model, self.config.target_layer + 1)}
        if self.whole:
            fingerprints["fingerprint"] = self.model.fingerprint()
        checks = selfcheck(self.model, [*self.concepts.values()], self.config, self.whole)
        role = "evaluator" if self.whole else "chain"
        return {
            "fingerprints": fingerprints, "host": socket.gethostname(), "device": name, "role": role, "checks": checks,
        }  # fmt: skip

    def find_base(self, concept: str) -> None:
        """The base vector, durable in `vectors`, its `candidates`, the `radius` curve, and figures in `summary`."""
        # Nothing of this concept can run beside it, so it may have the whole machine.
        torch.set_num_threads(cores())
        base = base_vectors.base_vector(self._slice([concept]), self.concepts[concept], self.config)
        torch.set_num_threads(self.threads)
        keys = {"run_id": self.run_id, "kind": "candidate"}
        found = [keys | candidate.row() for candidate in base.candidates]
        figures = {"radius": float(base.theta.norm()), **base.shares}
        facts = {"run_id": self.run_id, "kind": "base", "index": 0}
        written = {
            "vectors": schema.table("vectors", [row(self.run_id, "base", BaseVector(base.theta))]),
            "candidates": schema.table("candidates", found),
            "radius": schema.table("radius", self._curve(base.calibration)),
            "summary": schema.table("summary", [facts | {"figure": k, "value": v} for k, v in figures.items()]),
        }
        with contextlib.suppress(FileExistsError):  # another worker was first; what it wrote is the base
            self.run.commit(Unit.base(concept), written, exclusive=True)

    def chains(self, concepts: Sequence[str]) -> Iterator[Found]:
        """The chains of several concepts, from where storage says they stand; a vector is durable before it is yielded.

        On a GPU they advance in one batch. On the CPU, where a batch costs what its rows cost, they take turns, and
        each vector is to the bit what it would be in a run with one concept, resumed or not.

        Raises:
            FileExistsError: another worker is running the same chain; what it wrote stands.
        """
        groups = [list(concepts)] if self.model.device.type == "cuda" else [[concept] for concept in concepts]
        running = [self._chains(group) for group in groups]
        while running:
            for chain in list(running):
                try:
                    yield next(chain)
                except StopIteration:
                    running.remove(chain)

    def _chains(self, concepts: list[str]) -> Iterator[Found]:
        stored = {concept: stored_vectors(self.run, concept) for concept in concepts}
        # From the configuration alone: a resumed chain must take the same engine to find the same vectors to the bit.
        evaluations = self.config.num_vectors // self.config.block * self.config.max_evaluations
        part = self._slice(concepts, evaluations)
        bases = {concept: vectors.base.theta for concept, vectors in stored.items() if vectors.base is not None}
        earlier = {concept: vectors.chain for concept, vectors in stored.items()}
        stopped: dict[str, str] = {}
        told: set[str] = set()
        for concept, vector in chains(part, bases, self.config, earlier, stopped):
            written = {"vectors": schema.table("vectors", [row(self.run_id, "chain", vector)])}
            self.run.commit(Unit.vector(concept, vector.index), written, exclusive=True)
            yield Found(concept, vector, peak_memory=self._peak_memory())
            for name in stopped.keys() - told:
                told.add(name)
                yield Found(name, None, stopped[name])
        for name in stopped.keys() - told:
            yield Found(name, None, stopped[name])

    def _slice(self, concepts: Sequence[str], evaluations: int = 0) -> Slice:
        prompts = [self.model.tokenize(self.concepts[c].prompt, self.config.system_prompt) for c in concepts]
        return Slice(self.model, prompts, self.config.source_layer, self.config.target_layer, evaluations)

    def evaluate(self, unit: Unit, theta: np.ndarray, base: np.ndarray, failed: Mapping[int, int]) -> Evaluated:
        """Run a unit's evaluation and make its rows durable.

        Args:
            unit: what to evaluate.
            theta: (unit.last - unit.first + 1, d_model) float32.
            base: (d_model,) float32.
            failed: how often it has failed before, by index.
        """
        study = self._studies.get(unit.concept)
        if study is None or not np.array_equal(study.base.numpy(), base):
            concept = self.concepts[unit.concept]
            study = Study(self.model, self.config, concept, self.run_id, torch.from_numpy(base.copy()))
            self._studies[unit.concept] = study
        kind = "chain" if unit.kind == WHOLE else unit.kind
        vectors = Vectors(kind, range(unit.first, unit.last + 1), torch.from_numpy(theta.copy()))
        written = runner.evaluate(unit.evaluation, study, vectors, failed)
        self.run.commit(unit, written)
        return Evaluated(len(written["failures"]), self._peak_memory())

    def _peak_memory(self) -> int:
        """The most this process has taken until now: of its GPUs where it has some, else resident."""
        if self.model.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        return resident_peak()

    def _curve(self, calibration: Calibration | None) -> list[dict[str, Any]]:
        curve = zip(calibration.radii, calibration.nonlinearity, strict=True) if calibration else ()
        keys = {"run_id": self.run_id, "kind": "random"}
        return [keys | {"index": i, "radius": r, "nonlinearity": share} for i, (r, share) in enumerate(curve)]
