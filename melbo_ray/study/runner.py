"""Executing a run from a checked configuration: acquire the lease, drive, publish, audit."""

import contextlib
import copy
import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from rich.console import Console

from melbo_ray.cluster.backlog import UNFINISHED, Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.resources import Layout
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
from melbo_ray.study.placement import Growth, place
from melbo_ray.study.preflight import Checked, compare, defined, prompts, recorded
from melbo_ray.study.summary import base_figures, base_reason
from melbo_ray.study.upgrade import upgrade

_PUBLISH_EVERY, _LOOK_EVERY = 20.0, 1.0
# In other publications units wait until enough of their part are fresh.
_EVERYTHING_EVERY = 15
_FINGERPRINTS = ("fingerprint", "lower_fingerprint")
_PACKAGES = ("melbo_ray", "torch", "transformers", "ray", "pyarrow", "numpy", "s3fs")

D = TypeVar("D", bound=Driver)


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
    with leased(first_look) as lease:
        console.print(f"run {config.run_id} in {first_look.storage.url}", highlight=False, soft_wrap=True)
        stored = Run.open(url)
        with connected() as fixed:
            allowed = manifest.packed if manifest else ALL_PACKED
            layout = place(checked, len(checked.concepts) if chains else 0, fixed, allowed, console)
            study = StudyRun(stored, checked, start_manifest(stored, checked, layout.packed), lease, console, fixed)
            with Display(console, config.num_vectors) as study.display:
                study.drive(layout, chains)
        return stored, study.manifest


class StudyRun:
    """One driver's execution of a run: drive, publish every few seconds, and finish it or leave it resumable."""

    def __init__(
        self, run: Run, checked: Checked, manifest: Manifest, lease: Lease, console: Console, fixed: bool
    ) -> None:
        self.run, self.checked, self.manifest, self.lease = run, checked, manifest, lease
        self.display: Any = Display(console, checked.config.num_vectors)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future | None = None
        self._publications = 0
        # Concepts whose base was printed, and printed lines of the self-check.
        self._announced: set[str] = set()
        self._next_publication, self._next_look = time.monotonic() + _PUBLISH_EVERY, 0.0
        self._growth, self._started = Growth(checked.config, fixed), time.time()

    def drive(self, layout: Layout, chains: bool) -> None:
        """Drive the run to its end, or until it is stopped."""
        driver, finished = self.driver(Driver, layout, chains), False
        try:
            driver.drive()
            self.announce(driver)
            finished = True
        finally:
            self.conclude(driver, finished)

    def driver(self, make: Callable[..., D], layout: Layout, chains: bool) -> D:
        """The run's driver, made by `make`, whose arguments are the first seven of `Driver`."""
        config = self.checked.config
        backlogs = {concept.name: self._backlog(concept.name, chains) for concept in self.checked.concepts}
        driver = make(self.run, str(config.run_id), config, self.checked.concepts, backlogs, layout, self._tick)
        driver.fingerprints = {name: known for name in _FINGERPRINTS if (known := getattr(self.manifest, name))}
        driver.checks = copy.deepcopy(self.manifest.checks)
        return driver

    def conclude(self, driver: Driver, finished: bool) -> None:
        """Publish what is left and write the manifest, after the driver's loop has ended."""
        self._publisher.shutdown(wait=True)
        with contextlib.nullcontext() if finished else contextlib.suppress(UserError):
            self._update_manifest(driver)
            self.manifest.status = "finished" if finished else "interrupted"
            self.manifest.seconds += time.time() - self._started
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
        if time.monotonic() > self._next_look:  # at every worker's checks: not in every turn of the driver's loop
            self._next_look = time.monotonic() + _LOOK_EVERY
            self.announce(driver)
        driver.layout = self._growth.follow(driver.layout)
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

    def announce(self, driver: Driver) -> None:
        """Print what is new of the self-checks of the driver's workers."""
        for reason in [each for each in checks.reasons(driver.checks) if each not in self._announced]:
            self._announced.add(reason)
            self.display.say(f"self-check: {reason}")

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
        self._publications += 1
        everything = self._publications % _EVERYTHING_EVERY == 0
        self.run.publish(self.manifest, self.lease.check, everything)
        self.run.write_manifest(self.manifest)

    def _finish(self) -> None:
        """Publish the remaining units and audit the complete Gram matrices."""
        self.run.publish(self.manifest, self.lease.check)
        for name, outcome in self.manifest.concepts.items():
            stored = stored_vectors(self.run, name)
            thetas = [v.theta for v in (stored.base, *stored.chain) if v is not None] + stored.avoided
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


@contextlib.contextmanager
def leased(run: Run) -> Generator[Lease]:
    """Hold the lease of a run; one that was refused before it began leaves nothing behind."""
    lease = Lease(run.storage)
    try:
        yield lease
    finally:
        lease.release()
        with contextlib.suppress(StorageError):
            if run.storage.get("run.json") is None:
                run.storage.delete(run.storage.names("lease"))
                run.storage.prune()


def start_manifest(run: Run, checked: Checked, packed: Packed) -> Manifest:
    """Write and return the manifest of a run that starts or resumes."""
    manifest = _described(run.manifest() or _created(checked), checked)
    manifest.status, manifest.packed = "running", packed
    run.write_manifest(manifest)
    return manifest


def new_manifest(checked: Checked) -> Manifest:
    """The manifest of a new run, not written yet."""
    return _described(_created(checked), checked)


def _created(checked: Checked) -> Manifest:
    config = checked.config
    return Manifest(
        run_id=str(config.run_id),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=config.model,
        revision=config.revision,
        seed=config.seed,
        prompts_rendered=checked.rendered,
    )


def _described(manifest: Manifest, checked: Checked) -> Manifest:
    """The manifest with this configuration, its concepts and the software."""
    manifest.config, manifest.definitions = recorded(checked.config), defined(checked.concepts)
    manifest.prompts = prompts(checked.concepts)
    installed = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    known = {name: installed[name] for name in _PACKAGES if name in installed}
    manifest.versions = known | {"python": platform.python_version()}
    return manifest
