"""The right to drive a run: one driver at a time, by conditional writes in storage, with an expiry.

Leases are numbered objects `lease/000001.json`, …; the highest number rules. A driver renews its own object; another
takes over, once that has expired, by creating the next number, which exactly one can. Clocks of the machines may
differ by less than the time to live.
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
    """Another driver has taken the run over; this one must not write any more."""


class Lease:
    """Hold the lease of the run at `storage`, renewed by a thread until `release`.

    Args:
        storage: the run's folder; a brisk one, since a renewal that is tried for long writes an expiry that has passed.
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
        # Its holder may have renewed between our look and our creation; it will see ours, and we must see it.
        again = None if highest is None else _read(storage, highest)
        if again is not None and _alive(again, clock()):
            storage.put(_name(self._number), self._content(0.0))
            raise _refusal(storage, again, clock())
        storage.delete([_name(highest)] if highest else [])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return while the run is ours for some seconds more, renewing where it must; else raise.

        Raises:
            LeaseLostError: another driver has taken over.
            StorageError: the lease cannot be renewed, however patiently.
        """
        with self._lock:
            # A renewal that had to wait for storage has written an expiry that is near, or over: then another one.
            while self._lost is None and self._clock() > self._expires - TIME_TO_LIVE / 2:
                self._renew(self._patient)
            if self._lost is not None:
                raise self._lost

    def release(self) -> None:
        """Give the run back: the next driver need not wait for the expiry."""
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
                    continue  # the expiry stays what it was; `check` tries again before anything is published
            if self._lost is not None:
                return

    def _renew(self, storage: Storage) -> None:
        """Later expiry, once it is written and nobody is seen to have taken over."""
        expires = self._clock() + TIME_TO_LIVE
        storage.put(_name(self._number), self._content(expires))
        highest = _highest(storage)
        if highest is not None and highest > self._number:
            self._lost = LeaseLostError(f"{storage.url}: another driver has taken this run over; this one stops")
        else:
            self._expires = expires

    def _content(self, expires: float) -> bytes:
        place = {
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        return json.dumps({"owner": self._owner, "expires": expires, **place}).encode()


def holder(storage: Storage, clock: Callable[[], float] = time.time) -> dict | None:
    """Who drives the run at `storage` now: the lease's content, None where nobody does."""
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
    """What tells apart containers that share a host name: process ids mean something within one only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> float | None:
    """When the process `pid` of this machine started, which with its id names it; None where there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
