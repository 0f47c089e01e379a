"""Executing a run from a checked configuration: acquire the lease, drive, publish, audit."""

import contextlib
import copy
import dataclasses
import datetime
import importlib.metadata
import platform
import time
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console

from melbo_ray.cluster.backlog import UNFINISHED, Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.resources import lay_out
from melbo_ray.cluster.session import connected
from melbo_ray.errors import UserError
from melbo_ray.runs import checks
from melbo_ray.runs.lease import Lease
from melbo_ray.runs.manifest import ALL_PACKED, Manifest, Outcome, Packed
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SINK
from melbo_ray.runs.storage import StorageError
from melbo_ray.runs.work_unit import progress
from melbo_ray.search.subspace import max_abs_cos
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.display import Display
from melbo_ray.study.preflight import Checked, compare, defined, prompts, recorded
from melbo_ray.study.summary import base_figures, base_reason
from melbo_ray.study.upgrade import upgrade

_PUBLISH_EVERY = 20.0
_FINGERPRINTS = ("fingerprint", "lower_fingerprint")
_PACKAGES = ("melbo_ray", "torch", "transformers", "ray", "pyarrow", "numpy", "s3fs")


def run(checked: Checked, console: Console, chains: bool = True) -> tuple[Run, Manifest]:
    """Start or resume a run and complete its backlog; returns the run and its manifest.

    Args:
        checked: the checked configuration.
        console: output.
        chains: whether to extend the chains, and not only to evaluate their vectors.

    Raises:
        UserError: another driver holds the lease, the run has another configuration, or it cannot continue.
        KeyboardInterrupt: the run was stopped; the message says how to resume it.
    """
    try:
        return _run(checked, console, chains)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"stopped; the same command{checked.naming} resumes") from None


def _run(checked: Checked, console: Console, chains: bool) -> tuple[Run, Manifest]:
    config = checked.config
    url = f"{config.storage.rstrip('/')}/{config.run_id}"
    first_look = Run.open(url, patient=False)
    if manifest := first_look.manifest():
        compare(manifest, checked)
    with _lease(first_look) as lease:
        console.print(f"run {config.run_id} in {first_look.storage.url}", highlight=False, soft_wrap=True)
        stored = Run.open(url)
        with connected() as resources:
            allowed = manifest.packed if manifest else ALL_PACKED
            chains_due = len(checked.concepts) if chains else 0
            layout = lay_out(config, chains_due, checked.demands, *resources, allowed=allowed)
            if layout.packed != allowed:
                console.print(_unpacked_line(layout.packed), highlight=False, soft_wrap=True)
            study = _StudyRun(stored, checked, _start_manifest(stored, checked, layout.packed), lease, console)
            with Display(console, config.num_vectors) as study.display:
                study.drive(layout, chains)
        return stored, study.manifest


class _StudyRun:
    """One driver's execution of a run: drive, publish every few seconds, and finish it or leave it resumable."""

    def __init__(self, run: Run, checked: Checked, manifest: Manifest, lease: Lease, console: Console) -> None:
        self.run, self.checked, self.manifest, self.lease = run, checked, manifest, lease
        self.display = Display(console, checked.config.num_vectors)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future | None = None
        # Concepts whose base was printed, and printed lines of the self-check.
        self._announced: set[str] = set()
        self._next_publication = time.monotonic() + _PUBLISH_EVERY

    def drive(self, layout: Any, chains: bool) -> None:
        started, before = time.time(), self.manifest.seconds
        config = self.checked.config
        backlogs = {concept.name: self._backlog(concept.name, chains) for concept in self.checked.concepts}
        driver = Driver(self.run, str(config.run_id), config, self.checked.concepts, backlogs, layout, self._tick)
        driver.fingerprints = {name: known for name in _FINGERPRINTS if (known := getattr(self.manifest, name))}
        driver.checks = copy.deepcopy(self.manifest.checks)
        finished = False
        try:
            driver.drive()
            finished = True
        finally:
            self._publisher.shutdown(wait=True)
            with contextlib.nullcontext() if finished else contextlib.suppress(UserError):
                self._update_manifest(driver)
                self.manifest.status = "finished" if finished else "interrupted"
                self.manifest.seconds = before + time.time() - started
                self._finish()

    def _backlog(self, concept: str, chains: bool) -> Backlog:
        config = self.checked.config
        done = progress(self.manifest.done, self.run.fresh())
        backlog = Backlog(
            concept, config.evals, config.eval_batch, done, config.sample, config.num_vectors, config.block
        )
        backlog.add_stored(stored_vectors(self.run, concept))
        stopped = self.manifest.concepts.get(concept, Outcome()).stop_reason
        if backlog.found >= config.num_vectors:
            backlog.stop_reason = "num_vectors"
        elif stopped not in (None, "num_vectors", UNFINISHED):
            backlog.stop_reason = stopped
        elif not chains:
            backlog.stop_reason = UNFINISHED
        upgrade(self.run, self.manifest, backlog)
        backlog.retry(self.run.read("failures", concept).to_pylist())
        return backlog

    def _tick(self, driver: Driver) -> None:
        for name, backlog in driver.backlogs.items():
            if backlog.base is not None and name not in self._announced:
                self._announced.add(name)
                if reason := base_reason(self.run, name):
                    self.display.say(f"{name}: the base is {reason}")
                if figures := base_figures(self.run, name):
                    self.display.say(_base_line(name, figures))
        for reason in checks.reasons(driver.checks):
            if reason not in self._announced:
                self._announced.add(reason)
                self.display.say(f"self-check: {reason}")
        self.display.update(driver.backlogs, driver.last, driver.pool.ready)
        if (line := driver.wait_notice()) is not None:
            self.display.say(line)
        if self._publishing is not None and self._publishing.done():
            self._publishing.result()
            self._publishing = None
        if self._publishing is None and time.monotonic() > self._next_publication:
            self._next_publication = time.monotonic() + _PUBLISH_EVERY
            self._update_manifest(driver)
            self._publishing = self._publisher.submit(self._publish)

    def _update_manifest(self, driver: Driver) -> None:
        """Copy the driver's state into the manifest; not safe while a publication is running."""
        manifest = self.manifest
        for name, fingerprint in driver.fingerprints.items():
            setattr(manifest, name, fingerprint)
        manifest.hardware |= driver.hardware
        manifest.checks = copy.deepcopy(driver.checks)
        peaks = manifest.peak_memory
        peaks |= {role: max(peak, peaks.get(role, 0)) for role, peak in driver.peak_memory.items()}
        for name, backlog in driver.backlogs.items():
            outcome = manifest.concepts.setdefault(name, Outcome())
            outcome.vectors, outcome.stop_reason = backlog.found, backlog.stop_reason

    def _publish(self) -> None:
        self.lease.check()
        self.run.publish(self.manifest, self.lease.check)
        self.run.write_manifest(self.manifest)

    def _finish(self) -> None:
        """Publish the remaining units and audit the complete Gram matrices."""
        self.run.publish(self.manifest, self.lease.check)
        for name, outcome in self.manifest.concepts.items():
            stored = stored_vectors(self.run, name)
            thetas = [vector.theta for vector in (stored.base, *stored.chain) if vector is not None]
            outcome.max_abs_cos = max_abs_cos(torch.stack(thetas)) if thetas else None
            outcome.failures = len(self.run.read("failures", name))
        if self.manifest.status == "finished":
            self.run.storage.delete(self.run.storage.names("stages"))
        self.run.storage.sweep()
        self.lease.check()
        self.run.write_manifest(self.manifest)


def _base_line(concept: str, figures: Mapping[str, float]) -> str:
    line = f"{concept}: R = {figures['radius']:.4g}, {figures['sink_share']:.0%} of the target at the first position"
    if figures["sink_share"] < SINK:
        return line
    return f"{line}, an attention sink's activation: z from 0 (--z-from 0) would mostly match that"


def _unpacked_line(packed: Packed) -> str:
    """The line printed if some weights are not packed, which is slower and changes the last bits of results."""
    without = " and ".join(name for name, yes in dataclasses.asdict(packed).items() if not yes)
    return f"memory is short for packed copies of the weights: none for {without}, which costs time only"


@contextlib.contextmanager
def _lease(run: Run) -> Generator[Lease]:
    lease = Lease(run.storage)
    try:
        yield lease
    finally:
        lease.release()
        with contextlib.suppress(StorageError):
            if run.storage.get("run.json") is None:  # the run was refused before it began, so leave nothing behind
                run.storage.delete(run.storage.names("lease"))
                run.storage.prune()


def _start_manifest(run: Run, checked: Checked, packed: Packed) -> Manifest:
    """Write and return the manifest of a run that starts or resumes."""
    config = checked.config
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = run.manifest() or Manifest(
        run_id=str(config.run_id),
        created=now,
        model=config.model,
        revision=config.revision,
        seed=config.seed,
        prompts_rendered=checked.rendered,
    )
    manifest.config, manifest.definitions = recorded(config), defined(checked.concepts)
    manifest.prompts = prompts(checked.concepts)
    installed = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in _PACKAGES if name in installed}
    manifest.versions = versions | {"python": platform.python_version()}
    manifest.status, manifest.packed = "running", packed
    run.write_manifest(manifest)
    return manifest
