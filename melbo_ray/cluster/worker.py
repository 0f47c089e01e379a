"""A worker of a run, without Ray: it finds bases, runs chains and evaluates units.

A worker needs only the run's storage and configuration. It stores every result under a name that depends on the work
alone, so any worker can be lost, repeated, or overtaken by another.
"""

import contextlib
import dataclasses
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from melbo_ray.cluster.base_tables import base_tables
from melbo_ray.cluster.results import Evaluated, Found
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals import runner
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.evals.context import Chain, Study, Vectors
from melbo_ray.evals.rounding import rounding_error
from melbo_ray.evals.self_check import selfcheck, take_prompts
from melbo_ray.host import cores, progress, resident_peak
from melbo_ray.model.language_model import BALANCED, LanguageModel
from melbo_ray.model.partial import lower, lower_fingerprint
from melbo_ray.model.products import require_products
from melbo_ray.model.residual_slice import Slice
from melbo_ray.runs import schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search import base_vectors
from melbo_ray.search.chain import chains
from melbo_ray.search.stages import Kept
from melbo_ray.search.vectors import row, stored_vectors

_STUDIES = 2


class Worker:
    """One process of a run, which loads the model when it first needs it.

    Args:
        url: URL of the run's folder.
        run_id: name of the run, a column of every row.
        config: options of the run.
        concepts: the concepts under study.
        threads: torch threads on the CPU; constant for a worker, because results depend on it in the last bits.
        whole: whether to load the whole model; a chain actor needs only the layers up to the target.
        packed: as in `LanguageModel`, decided by the layout.
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
        self._studies, self._whole = dict[str, Study](), dict[str, Chain]()
        self._begun = dict[str, Kept[base_vectors.Base]]()
        torch.set_num_threads(threads)

    @cached_property
    def model(self) -> LanguageModel:
        """The model, spread over the worker's GPUs if it has several; or its layers up to the target."""
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
        """Load the model and run the self-check; returns what the driver registers of this worker.

        Raises:
            UserError: the model cannot be loaded, the worker does not see the driver's storage, its device lacks the
                products of `eval_products`, or the self-check fails (`selfcheck`).
        """
        if self.run.storage.get("run.json") is None:
            raise UserError(
                f"storage {self.run.storage.url} is not what the driver sees from {socket.gethostname()}: "
                "several machines need an object store or a shared file system"
            )
        # Ray calls methods in a thread of their own where another tells progress, and MKL's threads are by thread.
        torch.set_num_threads(self.threads)
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {self.threads} threads"
        fingerprints = {"lower_fingerprint": lower_fingerprint(self.model, self.config.target_layer + 1)}
        if self.whole:
            require_products(self.config.eval_products, device, self.model.dtype)
            fingerprints["fingerprint"] = self.model.fingerprint()
        checks = selfcheck(self.model, [*self.concepts.values()], self.config, self.whole)
        told = {"role": "evaluator" if self.whole else "chain", "fingerprints": fingerprints, "checks": checks}
        return told | {"host": socket.gethostname(), "device": name}

    def find_base(self, concept: str) -> str | None:
        """Do one stage of the search for a concept's base; returns what is done, or None once the base is stored.

        Every stage is stored, so that any worker does the next one, with the same result. The base is stored with its
        `candidates`, `radius` curve and `summary` statistics.
        """
        # No other unit of this concept can run yet, so the search may use all cores.
        torch.set_num_threads(cores())
        # A search holds a slice, so of those begun only the last one is kept.
        search, self._begun = self._begun.get(concept) or self._search(concept), {}
        self.rest()
        try:
            done = search.advance()
        finally:
            torch.set_num_threads(self.threads)
        if done is None:
            with contextlib.suppress(FileExistsError):  # another worker was first; the base that it stored counts
                self.run.commit(Unit.base(concept), base_tables(self.run_id, search.found), exclusive=True)
        else:
            self._begun = {concept: search}
        return done

    def _search(self, concept: str) -> Kept[base_vectors.Base]:
        begin = partial(base_vectors.base_search, self._slice([concept]), self.concepts[concept], self.config)
        return Kept(begin, self.run.storage, f"stages/{concept}")

    def chains(self, concepts: Sequence[str]) -> Iterator[Found]:
        """Continue the chains of several concepts from their stored state; each vector is stored before it is yielded.

        On a GPU the chains advance in one batch, unless limits are in multiples of R. On the CPU, where a batch costs
        as much as its rows, they take turns, and each vector equals that of a run with one concept bit for bit.

        Raises:
            FileExistsError: another worker runs the same chain; the vectors that it stored are kept.
        """
        batch = self.model.device.type == "cuda" and not isinstance(self.config.max_norm, str)
        running = [self._chains(group) for group in ([list(concepts)] if batch else [[one] for one in concepts])]
        while running:
            for chain in list(running):
                try:
                    yield next(chain)
                except StopIteration:
                    running.remove(chain)

    def _chains(self, concepts: list[str]) -> Iterator[Found]:
        stored = {concept: stored_vectors(self.run, concept) for concept in concepts}
        # From the configuration alone: a resumed chain must use the same engine to find bit-identical vectors.
        evaluations = self.config.num_vectors // self.config.block * self.config.max_evaluations
        slice_ = self._slice(concepts, evaluations)
        bases = {c: torch.stack([v.base.theta, *v.avoided]) for c, v in stored.items() if v.base is not None}
        stopped: dict[str, str] = {}
        reported: set[str] = set()
        for concept, vector in chains(slice_, bases, self.config, {c: v.chain for c, v in stored.items()}, stopped):
            written = {"vectors": schema.table("vectors", [row(self.run_id, "chain", vector)])}
            self.run.commit(Unit.vector(concept, vector.index), written, exclusive=True)
            yield Found(concept, vector, peak_memory=self._peak_memory())
            for name in stopped.keys() - reported:
                reported.add(name)
                yield Found(name, None, stopped[name])
        for name in stopped.keys() - reported:
            yield Found(name, None, stopped[name])

    def _slice(self, concepts: Sequence[str], evaluations: int = 0) -> Slice:
        prompts = [self.model.tokenize(self.concepts[c].prompt, self.config.system_prompt) for c in concepts]
        return Slice(self.model, prompts, self.config.source_layer, self.config.target_layer, evaluations)

    def evaluate(self, unit: Unit, theta: np.ndarray | None, base: np.ndarray, failed: Mapping[int, int]) -> Evaluated:
        """Run a unit's evaluation and store its rows.

        Args:
            unit: the unit.
            theta: the unit's vectors, (unit.last - unit.first + 1, d_model) float32; None for a share of an evaluation
                of the whole chain, which is read from the run.
            base: θ₀, (d_model,) float32.
            failed: number of earlier failures, by index.
        """
        self._begun = {}
        study, index = self._study(unit.concept, base), range(unit.first, unit.last + 1)
        if theta is None:
            chain = self._whole_chain(unit, study)
            written = runner.evaluate_share(unit.evaluation, unit.share, index, study, chain, failed)
        else:
            vectors = Vectors(unit.kind, index, torch.from_numpy(theta.copy()))
            written = runner.evaluate(unit.evaluation, study, vectors, failed)
        self.run.commit(unit, written)
        return Evaluated(
            len(written["failures"]), self._peak_memory(), socket.gethostname(), study.once(rounding_error)
        )

    def _study(self, concept: str, base: np.ndarray) -> Study:
        """The study of a concept; of concepts before, one is kept, because each takes up to half a gigabyte."""
        study = self._studies.pop(concept, None)
        while len(self._studies) >= _STUDIES:
            del self._studies[next(iter(self._studies))]
        self.rest()
        if study is None or not np.array_equal(study.base.numpy(), base):
            theta = torch.from_numpy(base.copy())
            avoided = stored_vectors(self.run, concept).avoided if self.config.orthogonal_to else ()
            study = Study(self.model, self.config, self.concepts[concept], self.run_id, theta, avoided)
        self._studies[concept] = study
        return study

    def rest(self) -> None:
        """Keep of its studies only what fits beside another one at work."""
        for study in self._studies.values():
            study.rest()

    def _whole_chain(self, unit: Unit, study: Study) -> Chain:
        """The chain of the unit's concept, kept until a unit of another concept or of a longer chain comes."""
        chain = self._whole.get(unit.concept)
        share = EVALUATIONS[unit.evaluation].share(unit.share)
        least = unit.last if share.of_vectors else share.settled or 0
        fits = chain is not None and (chain.length == unit.chain if unit.chain else chain.length >= least)
        if chain is None or not fits or chain.base is not study.base:
            # A worker of an earlier driver may have stored a vector more than this driver knows of.
            held = stored_vectors(self.run, unit.concept)
            found = held.chain[: unit.chain or None]
            vectors = Vectors("chain", [v.index for v in found], torch.stack([v.theta for v in found]))
            chain = Chain(study.base, vectors, lambda table: self.run.read(table, unit.concept), study.avoided)
            self._whole = {unit.concept: chain}
        return chain

    def progress(self) -> int:
        """Number of passes through models so far; another thread than that at work may ask."""
        return progress.passes

    def _peak_memory(self) -> int:
        """Peak memory of this process, bytes: of its GPUs if it has any, else resident."""
        if self.model.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        return resident_peak()
