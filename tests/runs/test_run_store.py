"""Storage, lease and run: on a local directory, in memory, and on a real S3 server."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import uuid

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import melbo_ray.runs.lease
import melbo_ray.runs.storage
from melbo_ray.cluster.backlog import Backlog
from melbo_ray.errors import UserError
from melbo_ray.runs.lease import TIME_TO_LIVE, Lease, LeaseLostError, holder
from melbo_ray.runs.manifest import Manifest, RenderedPrompt
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import table
from melbo_ray.runs.storage import Storage, StorageError
from melbo_ray.runs.work_unit import WHOLE, Task, Unit, count, cover, covers
from tests.s3 import environment, faulty, serve


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("weed")) as server, environment(server.environment):
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Botocore tries as often as ever, but at once: its pauses are random and double every time."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "runs" / "one")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4().hex}/one"
    return f"memory://{uuid.uuid4().hex}/one"


@pytest.fixture
def run(url):
    return Run.open(url)


def unit(first, last, evaluation="dose", kind="chain", concept="code"):
    return Unit(concept, evaluation, kind, first, last)


def rows(first, last, kind="chain", value=0.0, failures=()):
    facts = {"run_id": "one", "kind": kind}
    dose = {"scale": "own", "kl_from_base": value, "kl_to_base": 0.0, "kl_from_unsteered": 0.0, "concept_score": 0.0}
    failed = {"evaluation": "dose", "error": "NaN", "attempts": 1}
    return {
        "dose": table("dose", [facts | {"index": i, "norm": float(i)} | dose for i in range(first, last + 1)]),
        "failures": table("failures", [facts | {"index": i} | failed for i in failures]),
    }


def manifest(status="running"):
    return Manifest(run_id="one", status=status)


def indices(run, name="dose"):
    return run.read(name, "code")["index"].to_pylist()


# Storage


def test_what_is_put_is_there_and_can_be_replaced_listed_and_deleted(url):
    storage = Storage(url)
    assert storage.names() == []
    storage.put("a/b", b"one")
    storage.put("a/b", b"two")
    storage.put("c", b"three")
    assert (storage.get("a/b"), storage.get("a/none"), storage.get("a/b/c")) == (b"two", None, None)
    assert (storage.names(), storage.names("a")) == (["a/b", "c"], ["a/b"])
    storage.delete(["a/b", "gone"])
    assert Storage(url).names() == ["c"]


def test_one_of_many_creates(url):
    outcomes = []

    def create(number):
        outcomes.append(Storage(url).create("prize", str(number).encode()))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcomes) == 1


def test_creating_again_with_the_same_bytes_is_no_conflict(url):
    storage = Storage(url)
    assert [storage.create("prize", data) for data in (b"mine", b"mine", b"yours")] == [True, True, False]


def test_a_writer_killed_midway_leaves_nothing_to_be_seen(tmp_path):
    script = "import sys; from melbo_ray.runs.storage import Storage; s = Storage(sys.argv[1])"
    script += "\nwhile True: s.put('x', b'y' * 30_000_000)"
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    storage = Storage(str(tmp_path))
    while storage.get("x") is None:
        time.sleep(0.01)
    for _ in range(20):
        assert len(storage.get("x")) == 30_000_000
    writer.kill()
    writer.wait()
    assert storage.names() == ["x"]
    storage.sweep()
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "place",
    ["s3://AKIA:hunter2@bucket/x", "sftp://me:hunter2@host/x", "https://host/x?sig=hunter2", "abfs://c@hunter2.net/x"],
)
def test_a_url_with_a_credential_is_refused_and_not_repeated(place):
    with pytest.raises(UserError, match="credential") as caught:
        Storage(place)
    assert "hunter2" not in str(caught.value).replace("hunter2.net", "")


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="nosuch") as caught:
        Storage("nosuch://bucket/x")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], check=False).returncode:
        pytest.skip("cannot mount a small file system: run as root")
    try:
        storage = Storage(str(mount))
        storage.put("x", b"old")
        with pytest.raises(StorageError, match="disk is full"):
            storage.put("x", b"y" * 100_000)
        assert (storage.get("x"), os.listdir(mount)) == (b"old", ["x"])
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match="runs"):
        Storage(str(tmp_path / "runs" / "one")).put("x", b"y")


@pytest.mark.parametrize("code", ["SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout"])
def test_a_passing_fault_of_s3_is_retried(s3, code):
    with faulty(s3) as (through, faults), environment(through):
        faults.waiting += [(400 if code == "RequestTimeout" else 503, code)] * 2
        Storage("s3://bucket/faulty").put("x", b"y")
        assert (faults.served, Storage("s3://bucket/faulty").get("x")) == (3, b"y")


def test_a_connection_that_stalls_is_given_up_and_tried_again(s3, monkeypatch):
    monkeypatch.setattr(melbo_ray.runs.storage, "_READ_SECONDS", 1)
    with faulty(s3) as (through, faults), environment(through):
        faults.waiting += [2.5]
        Storage("s3://bucket/stalled").put("x", b"y")
        assert faults.served == 2


def test_a_creation_whose_answer_was_lost_is_known_as_ours(s3):
    with faulty(s3) as (through, faults), environment(through):
        storage = Storage("s3://bucket/lost")
        storage.put("x", b"mine")  # it arrived
        faults.waiting += [(500, "InternalError")]  # and the answer was an error
        assert storage.create("x", b"mine")


@pytest.mark.parametrize(
    ("fault", "message"), [((404, "NoSuchBucket"), "no such bucket"), ((403, "AccessDenied"), "access denied")]
)
def test_a_final_fault_of_s3_is_one_line_at_once(s3, fault, message):
    with faulty(s3) as (through, faults), environment(through):
        faults.waiting += [fault] * 5
        with pytest.raises(StorageError, match=message) as caught:
            Storage("s3://bucket/x").put("y", b"z")
        assert faults.served == 1
    assert "\n" not in str(caught.value)


def test_no_credential_is_in_what_is_said(s3):
    wrong = s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong-hunter2"}
    with environment(wrong), pytest.raises(StorageError, match="access denied") as denied:
        Storage("s3://bucket/x").put("y", b"z")
    with environment(s3.through(1)), pytest.raises(StorageError, match="cannot be reached") as away:
        Storage("s3://bucket/x", patient=False).put("y", b"z")
    for caught in (denied, away):
        assert "\n" not in str(caught.value)
        assert not any(secret in str(caught.value) for secret in ("hunter2", "tester"))


# Lease


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
    storage = Storage(url)
    first = Lease(storage)
    first._stop.set()  # its process hangs: nobody renews
    first._thread.join()
    _age(storage, "lease/000001.json", TIME_TO_LIVE + 1)
    first._expires -= TIME_TO_LIVE + 1
    second = Lease(storage)
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
    second.release()


def test_a_driver_whose_lease_ran_out_untaken_goes_on(url):
    storage = Storage(url)
    lease = Lease(storage)
    lease._expires -= TIME_TO_LIVE + 1
    lease.check()
    assert holder(storage) is not None
    lease.release()


def test_a_driver_that_is_cut_off_from_storage_does_not_believe_that_it_renews(tmp_path, monkeypatch):
    monkeypatch.setattr(melbo_ray.runs.lease, "_RENEW_EVERY", 0.01)
    storage, tries = Storage(str(tmp_path)), []
    cut_off = Storage(str(tmp_path))
    first = Lease(cut_off)

    def away(name, data):
        tries.append(name)
        raise StorageError("away")

    cut_off.put = away
    while len(tries) < 5:
        time.sleep(0.01)
    _age(storage, "lease/000001.json", TIME_TO_LIVE + 1)
    first._expires -= TIME_TO_LIVE + 1  # so much later it is
    Lease(storage).release()
    with pytest.raises(LeaseLostError):
        first.check()


def test_a_renewal_that_took_as_long_as_the_lease_lasts_is_renewed_again(tmp_path, monkeypatch):
    clock = [time.time()]
    lease = Lease(Storage(str(tmp_path)))
    lease._stop.set()
    lease._thread.join()
    waits, put = [2 * TIME_TO_LIVE], lease._patient.put

    def slow(name, data):
        clock[0] += waits.pop() if waits else 0
        put(name, data)

    monkeypatch.setattr(lease._patient, "put", slow)
    monkeypatch.setattr(melbo_ray.runs.lease.time, "time", lambda: clock[0])
    clock[0] += TIME_TO_LIVE
    lease.check()
    assert json.loads(lease._storage.get("lease/000001.json"))["expires"] == clock[0] + TIME_TO_LIVE
    lease.release()


def test_a_lease_outlives_a_storage_that_is_away_for_seconds(s3):
    with faulty(s3) as (through, faults), environment(through):
        lease = Lease(Storage(f"s3://bucket/{uuid.uuid4().hex}", patient=False))
        lease._stop.set()
        lease._thread.join()
        lease._expires -= TIME_TO_LIVE
        faults.waiting += [(503, "SlowDown")] * 4  # more than the brisk storage tries
        lease.check()
        lease.release()


def _age(storage, name, seconds):
    lease = json.loads(storage.get(name))
    storage.put(name, json.dumps(lease | {"expires": lease["expires"] - seconds, "host": "elsewhere"}).encode())


# Units and tables


def test_a_unit_is_named_by_its_work():
    one = Unit("my-concept", "kl", "chain", 9, 16)
    assert one.name == "units/my-concept/kl.chain.000009-000016.zip"
    assert Unit.of(one.name) == one
    assert one.task is Task.EVALUATION


def test_the_searches_are_units_of_their_own_under_the_names_that_runs_have():
    base, vector = Unit.base("code"), Unit.vector("code", 7)
    assert (base.name, base.task) == ("units/code/base.base.000000-000000.zip", Task.BASE)
    assert (vector.name, vector.task) == ("units/code/chain.chain.000007-000007.zip", Task.CHAIN)
    assert (Unit.of(base.name), Unit.of(vector.name)) == (base, vector)


def test_rows_are_read_the_same_fresh_and_published(run):
    run.commit(unit(1, 8), rows(1, 8, failures=[3]))
    run.commit(unit(9, 12), rows(9, 12))
    run.commit(unit(0, 0, kind="base"), rows(0, 0, "base"))
    fresh = run.read("dose", "code")
    state = manifest()
    run.publish(state, lambda: None)
    assert run.fresh() == []
    assert run.read("dose", "code").equals(fresh)
    assert indices(run) == list(range(13))
    assert indices(run, "failures") == [3]
    assert run.manifest().done == {"code": {"dose": {"base": [[0, 0]], "chain": [[1, 12]]}}}
    assert [n for n in run.storage.names() if n.endswith(".parquet")] == [
        "dose/concept=code/part-dose-00000.parquet",
        "failures/concept=code/part-dose-00000.parquet",
    ]


def test_publishing_again_adds_to_the_part_and_long_chains_get_several(run):
    state = manifest()
    for first in (1, 9, 505, 513):
        run.commit(unit(first, first + 7), rows(first, first + 7))
        run.publish(state, lambda: None)
    assert len(run.storage.names("dose")) == 2
    assert indices(run) == [*range(1, 17), *range(505, 521)]
    assert count(state.done, "code", "dose", "chain") == 32


def test_a_unit_written_again_after_it_was_published_is_not_doubled(run):
    state = manifest()
    for _ in range(2):
        run.commit(unit(1, 8), rows(1, 8))
        assert indices(run) == list(range(1, 9))
        run.publish(state, lambda: None)
    assert indices(run) == list(range(1, 9))


def test_an_evaluation_of_the_whole_chain_replaces_that_of_a_shorter_one(run):
    state = manifest()
    run.commit(unit(1, 8, kind=WHOLE), rows(1, 3))
    run.publish(state, lambda: None)
    run.commit(unit(1, 16, kind=WHOLE), rows(1, 2))
    assert indices(run) == [1, 2]
    run.publish(state, lambda: None)
    assert indices(run) == [1, 2]
    assert not covers(state.done, unit(1, 17, kind=WHOLE))


@pytest.mark.parametrize(("before", "after"), [((), (2,)), ((2,), ())])
def test_an_evaluation_of_the_whole_chain_that_has_no_rows_now_takes_its_old_ones_away(run, before, after):
    state = manifest()
    for last, failures in ((8, before), (16, after)):
        run.commit(unit(1, last, kind=WHOLE), rows(1, 0 if failures else 3, failures=failures))
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([] if after else [1, 2, 3], list(after))


@pytest.mark.parametrize("spans", [[(1, 4), (1, 8)], [(1, 8), (5, 12)], [(3, 4), (7, 7), (1, 12)]])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_units_that_overlap_are_not_doubled(run, spans, one_by_one):
    """A lingering evaluator and a resume with another --eval-batch, or with a longer chain."""
    state = manifest()
    for first, last in spans:
        run.commit(unit(first, last), rows(first, last, failures=[4] if first <= 4 else []))
        if one_by_one:
            run.publish(state, lambda: None)
    everything = list(range(1, max(last for _, last in spans) + 1))
    assert (indices(run), indices(run, "failures")) == (everything, [4])
    run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == (everything, [4])


def test_killed_anywhere_publishing_loses_and_doubles_nothing(url, monkeypatch):
    """Every write and deletion in turn is the last one that happens; then another driver finishes."""
    for deaths in range(12):
        run = Run.open(f"{url}-{deaths}")
        for first in (1, 9):
            run.commit(unit(first, first + 7), rows(first, first + 7, failures=[first]))
        calls = iter(range(100))

        def dying(method, calls=calls, deaths=deaths):
            def call(*args):
                if next(calls) >= deaths:
                    raise KeyboardInterrupt
                return method(*args)

            return call

        with monkeypatch.context() as patch:
            for write in ("put", "swap"):
                patch.setattr(run.storage, write, dying(getattr(run.storage, write)))
            patch.setattr(run.storage, "delete", dying(run.storage.delete))
            with contextlib.suppress(KeyboardInterrupt):
                run.publish(manifest(), lambda: None)
        again = Run.open(f"{url}-{deaths}")
        assert indices(again) == list(range(1, 17))
        state = again.manifest() or manifest()
        again.publish(state, lambda: None)
        assert (indices(again), indices(again, "failures")) == (list(range(1, 17)), [1, 9])
        assert state.done["code"]["dose"]["chain"] == [[1, 16]] if state.done else again.fresh() == []


def test_sql_over_the_tables_sees_a_growing_whole_while_they_are_published(tmp_path):
    run, state, seen, stop = Run.open(str(tmp_path / "one")), manifest(), [], threading.Event()
    run.commit(unit(1, 8), rows(1, 8))
    run.publish(state, lambda: None)

    def look():
        while not stop.is_set():
            sql = f"SELECT list(index ORDER BY index) FROM '{tmp_path}/*/dose/**/*.parquet'"
            with contextlib.suppress(duckdb.Error):  # it opens a part twice: replaced between, it refuses to answer
                seen.append(duckdb.connect().execute(sql).fetchall()[0][0])

    reader = threading.Thread(target=look)
    reader.start()
    for first in range(9, 1200, 8):
        run.commit(unit(first, first + 7), rows(first, first + 7))
        if first % 3 == 0:
            run.publish(state, lambda: None)
    stop.set()
    reader.join()
    assert len(seen) > 5
    assert all(view == list(range(1, len(view) + 1)) for view in seen)
    assert [len(view) for view in seen] == sorted(len(view) for view in seen)


def test_a_driver_that_has_lost_its_lease_publishes_nothing(run):
    run.commit(unit(1, 8), rows(1, 8))

    def lost():
        raise LeaseLostError("lost")

    before = run.storage.names()
    with pytest.raises(LeaseLostError):
        run.publish(manifest(), lost)
    assert run.storage.names() == before


@pytest.mark.parametrize("published", [0, 1])
def test_a_write_that_arrives_after_another_driver_has_published_changes_nothing(s3, published):
    url = f"s3://bucket/{uuid.uuid4().hex}/one"
    late, other = Run.open(url), Run.open(url)
    for first in range(1, 9 * published, 8):
        late.commit(unit(first, first + 7), rows(first, first + 7))
        late.publish(manifest(), lambda: None)
    late.commit(unit(17, 24), rows(17, 24))
    holdups = [True]

    def held_up():
        if holdups and holdups.pop():
            other.commit(unit(25, 32), rows(25, 32))
            other.manifest()
            other.publish(manifest(), lambda: None)

    before = late.storage.names()
    with pytest.raises(StorageError, match="pre-conditions"):
        late.publish(manifest(), held_up)
    assert before != late.storage.names()
    assert indices(other) == [*range(1, 1 + 8 * published), *range(17, 33)]


def test_a_swap_whose_answer_was_lost_is_known_as_ours(s3):
    with faulty(s3) as (through, faults), environment(through):
        storage = Storage("s3://bucket/swapped")
        storage.put("x", b"old")
        version = storage.version("x")
        storage.put("x", b"new")  # it arrived
        faults.waiting += [(500, "InternalError")]  # and the answer was an error
        storage.swap("x", b"new", version)
        with pytest.raises(StorageError):
            storage.swap("x", b"newer", version)
        assert storage.get("x") == b"new"


def test_an_exclusive_unit_belongs_to_its_first_writer(run):
    run.commit(unit(1, 1), rows(1, 1, value=1.0), exclusive=True)
    run.commit(unit(1, 1), rows(1, 1, value=1.0), exclusive=True)
    with pytest.raises(FileExistsError):
        run.commit(unit(1, 1), rows(1, 1, value=2.0), exclusive=True)
    assert run.read("dose", "code")["kl_from_base"].to_pylist() == [1.0]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"{", b'{"schema_version": 99}', b'{"schema_version": 2, "done": 1}']
)
def test_a_manifest_that_cannot_be_read_is_one_line(run, content):
    run.storage.put("run.json", content)
    with pytest.raises(UserError, match=r"run\.json|schema version 99") as caught:
        run.manifest()
    assert "\n" not in str(caught.value)


def test_token_ids_stand_on_one_line_and_no_text_changes(tmp_path):
    run = Run.open(f"{tmp_path}/one")
    told = manifest()
    told.prompts_rendered = {"code": {"training": RenderedPrompt(text="[\n 1,\n 2\n]", tokens=[1, 22, 333])}}
    told.config, told.done = {"none": []}, {"code": {"kl": {"chain": [[1, 8]]}}}
    run.write_manifest(told)
    found = run.manifest()
    assert found.model_dump(exclude={"updated"}) == told.model_dump(exclude={"updated"})
    assert b'"tokens": [ 1, 22, 333 ]\n' in run.storage.get("run.json")


def test_coverage_is_kept_as_few_spans():
    done = {}
    for first, last in [(9, 16), (1, 8), (25, 32), (9, 16)]:
        cover(done, unit(first, last))
    assert done == {"code": {"dose": {"chain": [[1, 16], [25, 32]]}}}
    assert covers(done, unit(3, 12))
    assert not covers(done, unit(16, 17))


@pytest.mark.parametrize(("before", "after"), [(8, 20), (20, 8), (1, 600)])
def test_units_of_two_batch_sizes_are_not_doubled_across_the_border_of_two_parts(tmp_path, before, after):
    """A resume with another --eval-batch, then an evaluator that lingers from before it."""
    run, state = Run.open(str(tmp_path / "one")), manifest()
    for batch in (before, after, before):
        backlog = Backlog("code", ["dose"], batch, {}, stop_reason="num_vectors")
        backlog.theta = {"base": {0: np.ones(1)}, "chain": dict.fromkeys(range(1, 601), np.ones(1))}
        for due in backlog.due():
            if due.kind == "chain" and due.last > 490 and due.first < 530:
                run.commit(due, rows(due.first, due.last))
        run.publish(state, lambda: None)
    published = duckdb.execute(f"SELECT index FROM '{tmp_path}/*/dose/**/*.parquet' ORDER BY index").fetchnumpy()
    assert len(run.storage.names("dose")) == 2
    assert published["index"].tolist() == indices(run) == sorted(set(indices(run)))
    assert {491, 512, 513, 529} <= set(indices(run))


@pytest.mark.parametrize("published", [True, False])
def test_a_vector_that_failed_and_then_succeeds_has_its_rows_and_no_failure(run, published):
    state = manifest()
    run.commit(unit(0, 0, kind="base"), rows(0, 0, "base"))
    run.commit(unit(1, 8), without(rows(1, 8, failures=[3, 4, 5]), [3, 4, 5]))
    if published:
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([0, 1, 2, 6, 7, 8], [3, 4, 5])
    again = unit(3, 5), without(rows(3, 5, failures=[4]), [4])
    for _ in range(2):  # and once more, by one that lingers
        run.commit(*again)
        assert (indices(run), indices(run, "failures")) == ([0, 1, 2, 3, 5, 6, 7, 8], [4])
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([0, 1, 2, 3, 5, 6, 7, 8], [4])


def test_a_failure_that_arrives_after_the_success_changes_nothing(run):
    state = manifest()
    for failures in ([3], [], [3]):
        run.commit(unit(1, 4), without(rows(1, 4, failures=failures), failures))
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([1, 2, 3, 4], [])


@pytest.mark.parametrize("published", [True, False])
def test_an_evaluation_of_the_whole_chain_that_failed_can_be_done_again(run, published):
    state = manifest()
    run.commit(unit(1, 8, kind=WHOLE), rows(1, 0, failures=[0]))
    if published:
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([], [0])
    run.commit(unit(1, 8, kind=WHOLE), rows(1, 8))
    for _ in range(2):
        assert (indices(run), indices(run, "failures")) == (list(range(1, 9)), [])
        run.publish(state, lambda: None)


def without(written, failures):
    """The rows of vectors that did not fail."""
    return written | {"dose": written["dose"].filter(~pc.is_in(pc.field("index"), pa.array(failures, pa.int32())))}


def test_a_driver_that_was_superseded_does_not_replace_the_manifest(run, url):
    newer = Run.open(url)
    for state in ("running", "interrupted"):
        run.write_manifest(manifest(state))
    newer.manifest()
    newer.write_manifest(manifest("finished"))
    with pytest.raises(StorageError, match="another driver has written it"):
        run.write_manifest(manifest())
    assert newer.manifest().status == "finished"


@pytest.mark.parametrize("before", [[], ["running"]])
def test_a_manifest_that_arrives_late_changes_nothing(s3, monkeypatch, before):
    """The driver stalls between its look and its write, and another begins or goes on with the run."""
    url = f"s3://bucket/{uuid.uuid4().hex}/one"
    late, newer = Run.open(url), Run.open(url)
    for state in before:
        late.write_manifest(manifest(state))
    look, looks = late.storage.get, []

    def stalls(name):
        found = look(name)
        if not looks:
            newer.manifest()
            newer.write_manifest(manifest("finished"))
        looks.append(name)
        return found

    monkeypatch.setattr(late.storage, "get", stalls)
    with pytest.raises(StorageError, match="pre-conditions"):
        late.write_manifest(manifest())
    assert newer.manifest().status == "finished"
