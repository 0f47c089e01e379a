"""A worker of several runs of one model: the weights are loaded once, each run has its own study."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals.self_check import take_prompts

# A run keeps what its evaluations share, up to half a gigabyte; units of a run come mostly one after another.
_KEPT = 2


@dataclass(frozen=True)
class Job:
    """A run as a worker needs it; the fields are those of `Worker`."""

    url: str
    run_id: str
    config: Config
    concepts: Sequence[Concept]


class SharedWorker(Worker):
    """A worker that begins with one run, and takes units of others whose options of the model are the same."""

    def ready(self) -> dict[str, Any]:
        """As `Worker.ready`, with the run that was checked (`run_id`)."""
        self._workers: dict[str, Worker] = {self.run_id: self}
        self._checked = {self.run_id}
        self._at = self.run_id
        return super().ready() | {"run_id": self.run_id}

    def of_run(self, job: Job, method: str, *args: Any) -> tuple[dict[str, Any] | None, Any]:
        """Call a method for a run; returns what `ready` says if this is the first of that run, and the method's result.

        Raises:
            UserError: as `ready`, for that run's layers and prompts.
        """
        worker, registered = self._worker(job), None
        if job.run_id not in self._checked:
            registered = Worker.ready(worker)
            self._checked.add(job.run_id)
        return registered, getattr(worker, method)(*args)

    def _worker(self, job: Job) -> Worker:
        worker = self._workers.pop(job.run_id, None)
        while len(self._workers) >= _KEPT:
            left = self._workers.pop(next(iter(self._workers)))
            for kept in (left._studies, left._whole, left._begun):  # it may be this worker itself, which stays
                kept.clear()
        if worker is None:
            worker = Worker(job.url, job.run_id, job.config, job.concepts, self.threads, self.whole, self.packed)
            worker.model = self.model
        self._workers[job.run_id] = worker
        if self._at != job.run_id:
            self._at = job.run_id
            for other in self._workers.values():
                other.rest()
            self._take_prompts(worker)
        return worker

    def _take_prompts(self, worker: Worker) -> None:
        """Give the model the prompts as the run has rendered them, which may be with another day's date."""
        if (manifest := worker.run.manifest()) is not None:
            take_prompts(self.model, manifest.prompts_rendered, worker.concepts, worker.config.system_prompt)
