"""The lease of a run: it ensures one driver at a time, by conditional writes to storage and an expiry.

Leases are numbered objects `lease/000001.json`, …; the highest number is valid. A driver renews its own object. Once
that has expired, another driver takes over by creating the next number, which only one can. The machines' clocks must
agree within the time to live.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from melbo_ray.errors import UserError
from melbo_ray.runs.storage import Storage, StorageError

TIME_TO_LIVE = 30.0
_RENEW_EVERY = 5.0


class LeaseLostError(UserError):
    """Another driver has taken over the run, so this one must stop writing."""


class Lease:
    """Acquire the lease of a run; a thread renews it until `release`.

    Args:
        storage: the run's folder, with few retries, because a renewal that is delayed for long has already expired.
        clock: seconds since the epoch.
        renew_every: seconds between renewals.

    Raises:
        UserError: another driver holds it.
    """

    def __init__(
        self, storage: Storage, clock: Callable[[], float] = time.time, renew_every: float = _RENEW_EVERY
    ) -> None:
        self._storage, self._patient = storage, Storage(storage.url)
        self._clock, self._renew_every = clock, renew_every
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._lost: LeaseLostError | None = None
        highest = _highest(storage)
        before = None if highest is None else _read(storage, highest)
        if before is not None and _alive(before, clock()):
            raise _refusal(storage, before, clock())
        self._number = (highest or 0) + 1
        self._expires = clock() + TIME_TO_LIVE
        if not storage.create(_name(self._number), self._content(self._expires)):
            raise _refusal(storage, _read(storage, self._number), clock())
        # The holder may have renewed between our read and our write; it sees our lease, and we must see its renewal.
        again = None if highest is None else _read(storage, highest)
        if again is not None and _alive(again, clock()):
            storage.put(_name(self._number), self._content(0.0))
            raise _refusal(storage, again, clock())
        storage.delete([_name(highest)] if highest else [])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Ensure that the lease is valid for at least half of its time to live, renewing it if necessary.

        Raises:
            LeaseLostError: another driver has taken over.
            StorageError: the lease cannot be renewed.
        """
        with self._lock:
            # A renewal that waited for storage may already be near its expiry, hence the loop.
            while self._lost is None and self._clock() > self._expires - TIME_TO_LIVE / 2:
                self._renew(self._patient)
            if self._lost is not None:
                raise self._lost

    def release(self) -> None:
        """Release the lease, so that the next driver need not wait for its expiry."""
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(StorageError):
                self._storage.put(_name(self._number), self._content(0.0))

    def _keep(self) -> None:
        while not self._stop.wait(self._renew_every):
            with self._lock:
                try:
                    self._renew(self._storage)
                except StorageError:
                    continue  # the expiry is unchanged; `check` renews again before anything is published
            if self._lost is not None:
                return

    def _renew(self, storage: Storage) -> None:
        """Extend the expiry, unless another driver has taken over."""
        expires = self._clock() + TIME_TO_LIVE
        storage.put(_name(self._number), self._content(expires))
        highest = _highest(storage)
        if highest is not None and highest > self._number:
            self._lost = LeaseLostError(f"{storage.url}: another driver has taken this run over; this one stops")
        else:
            self._expires = expires

    def _content(self, expires: float) -> bytes:
        process = {
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        return json.dumps({"owner": self._owner, "expires": expires, **process}).encode()


def holder(storage: Storage, clock: Callable[[], float] = time.time) -> dict | None:
    """The content of the valid lease, which identifies the run's driver; None if the run has no driver."""
    highest = _highest(storage)
    found = None if highest is None else _read(storage, highest)
    return found if found is not None and _alive(found, clock()) else None


def _name(number: int) -> str:
    return f"lease/{number:06d}.json"


def _highest(storage: Storage) -> int | None:
    return max((int(name.rpartition("/")[2].removesuffix(".json")) for name in storage.names("lease")), default=None)


def _read(storage: Storage, number: int) -> dict | None:
    data = storage.get(_name(number))
    return None if data is None else json.loads(data)


def _alive(lease: dict, now: float) -> bool:
    if lease["expires"] < now:
        return False
    here = lease["host"] == socket.gethostname() and lease["namespace"] == _namespace()
    return not here or abs((_born(lease["pid"]) or 0.0) - lease["born"]) < 2.0


def _refusal(storage: Storage, lease: dict | None, now: float) -> UserError:
    if lease is None:
        return UserError(f"{storage.url}: another driver took this run this very moment; try again")
    left = max(1, round(lease["expires"] - now))
    return UserError(
        f"{storage.url}: another driver (process {lease['pid']} on {lease['host']}) is at work on this run; "
        f"if it is dead, its lease runs out in {left} s"
    )


def _namespace() -> str:
    """Id of the boot and of the PID namespace, which distinguishes containers with the same host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> float | None:
    """Start time of the process `pid` on this machine, as pids are reused; None if there is no such process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
