"""The lease: of many drivers one, through crashes, hangs and a storage that is away."""

import json
import multiprocessing
import os
import threading
import time
import uuid

import pytest

from melbo_ray.errors import UserError
from melbo_ray.runs.lease import TIME_TO_LIVE, Lease, LeaseLostError, holder
from melbo_ray.runs.storage import Storage, StorageError
from tests.clock import Clock
from tests.s3 import environment, faulty

NEVER = threading.TIMEOUT_MAX


def test_the_second_driver_is_refused_until_the_first_releases(url):
    first = Lease(Storage(url))
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lease(Storage(url))
    assert holder(Storage(url))["pid"] == os.getpid()
    first.release()
    assert holder(Storage(url)) is None
    Lease(Storage(url)).release()


def test_of_many_drivers_one_gets_the_lease(url):
    held, refused = [], []

    def drive():
        try:
            held.append(Lease(Storage(url)))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=drive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()


def test_a_dead_driver_of_this_machine_is_taken_over_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_hold, args=(str(tmp_path),))
    process.start()
    while holder(Storage(str(tmp_path))) is None:
        time.sleep(0.05)
    process.kill()
    process.join()
    Lease(Storage(str(tmp_path))).release()


def _hold(url):
    Lease(Storage(url))
    time.sleep(600)


def test_a_driver_whose_lease_ran_out_and_was_taken_stops(url):
    storage, clock = Storage(url), Clock()
    first = Lease(storage, clock, NEVER)  # its process hangs: nobody renews
    clock.add(TIME_TO_LIVE + 1)
    second = Lease(storage, clock)
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
    second.release()


def test_a_driver_whose_lease_ran_out_untaken_goes_on(url):
    storage, clock = Storage(url), Clock()
    lease = Lease(storage, clock)
    clock.add(TIME_TO_LIVE + 1)
    lease.check()
    assert holder(storage, clock) is not None
    lease.release()


def test_a_driver_that_is_cut_off_from_storage_does_not_believe_that_it_renews(tmp_path):
    tries, clock = [], Clock()
    cut_off = Storage(str(tmp_path))
    first = Lease(cut_off, clock, renew_every=0.01)

    def away(name, data):
        tries.append(name)
        raise StorageError("away")

    cut_off.put = away
    while len(tries) < 5:
        time.sleep(0.01)
    clock.add(TIME_TO_LIVE + 1)
    Lease(Storage(str(tmp_path)), clock).release()
    with pytest.raises(LeaseLostError):
        first.check()
    first.release()


def test_a_renewal_that_took_as_long_as_the_lease_lasts_is_renewed_again(tmp_path, monkeypatch):
    storage, clock = Storage(str(tmp_path)), Clock()
    lease = Lease(storage, clock, NEVER)
    waits, put = [2 * TIME_TO_LIVE], Storage.put

    def slow(storage, name, data):
        clock.add(waits.pop() if waits else 0)
        put(storage, name, data)

    monkeypatch.setattr(Storage, "put", slow)
    clock.add(TIME_TO_LIVE)
    lease.check()
    assert json.loads(storage.get("lease/000001.json") or b"")["expires"] == clock() + TIME_TO_LIVE
    lease.release()


def test_a_lease_outlives_a_storage_that_is_away_for_seconds(s3):
    with faulty(s3) as (through, faults), environment(through):
        clock = Clock()
        lease = Lease(Storage(f"s3://bucket/{uuid.uuid4().hex}", patient=False), clock, NEVER)
        clock.add(TIME_TO_LIVE)
        faults.waiting += [(503, "SlowDown")] * 4  # more than the brisk storage tries
        lease.check()
        lease.release()
