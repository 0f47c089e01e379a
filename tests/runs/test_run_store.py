"""A run in storage: no row of it is lost or doubled, whoever writes, is killed or lingers."""

import contextlib
import threading
import time
import uuid

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.runs import part_files
from melbo_ray.runs.lease import LeaseLostError
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import table
from melbo_ray.runs.storage import StorageError
from melbo_ray.runs.work_unit import Unit, count, covers, of_chain


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


def of(length, first=1, last=4):
    """A unit whose rows depend on the length of the chain."""
    return unit(first, last, "dose", of_chain("share", length))


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("lengths", [(9, 100), (100, 9)])
def test_what_depends_on_the_chains_length_is_replaced_by_that_of_a_longer_chain(run, lengths, one_by_one):
    state = manifest()
    run.commit(unit(1, 8), rows(1, 8))
    for length in lengths:
        run.commit(of(length), rows(1, 4, kind="random", value=float(length)))
        if one_by_one:
            run.publish(state, lambda: None)
    for _ in range(2):
        assert indices(run) == sorted([*range(1, 9), *range(1, 5)])
        assert set(run.read("dose", "code")["kl_from_base"].to_pylist()) == {0.0, 100.0}
        run.publish(state, lambda: None)
    assert covers(state.done, of(100))
    assert not covers(state.done, of(101))


@pytest.mark.parametrize(("before", "after"), [((), (2,)), ((2,), ())])
def test_a_share_of_a_longer_chain_that_has_no_rows_takes_those_of_the_shorter_away(run, before, after):
    state = manifest()
    for length, failures in ((8, before), (16, after)):
        run.commit(of(length), rows(1, 0 if failures else 3, failures=failures))
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


def test_the_parts_of_an_evaluation_are_written_in_their_order(tmp_path, monkeypatch):
    run, written = Run.open(str(tmp_path / "one")), []
    for first in range(1, 1537, 256):
        run.commit(unit(first, first + 255), rows(first, first + 255))
    names, swap = [f"dose/concept=code/part-dose-{number:05d}.parquet" for number in range(3)], run.storage.swap

    def slowest_first(name, data, version):
        if name in names:
            time.sleep(0.1 * (3 - names.index(name)))
            written.append(name)
        return swap(name, data, version)

    monkeypatch.setattr(run.storage, "swap", slowest_first)
    run.publish(manifest(), lambda: None)
    assert written == names


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


def test_an_exclusive_unit_belongs_to_its_first_writer(run):
    run.commit(unit(1, 1), rows(1, 1, value=1.0), exclusive=True)
    run.commit(unit(1, 1), rows(1, 1, value=1.0), exclusive=True)
    with pytest.raises(FileExistsError):
        run.commit(unit(1, 1), rows(1, 1, value=2.0), exclusive=True)
    assert run.read("dose", "code")["kl_from_base"].to_pylist() == [1.0]


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
def test_a_share_that_failed_can_be_done_again(run, published):
    state = manifest()
    run.commit(of(8, 0, 0), rows(1, 0, failures=[0]))
    if published:
        run.publish(state, lambda: None)
    assert (indices(run), indices(run, "failures")) == ([], [0])
    run.commit(of(8, 0, 0), rows(1, 8))
    for _ in range(2):
        assert (indices(run), indices(run, "failures")) == (list(range(1, 9)), [])
        run.publish(state, lambda: None)


def without(written, failures):
    """The rows of vectors that did not fail."""
    return written | {"dose": written["dose"].filter(~pc.is_in(pc.field("index"), pa.array(failures, pa.int32())))}  # ty: ignore[missing-attribute]


def test_a_part_that_grows_is_written_anew_a_few_times_only(monkeypatch):
    run = Run.open(f"memory://{uuid.uuid4().hex}/one")
    written, swap = [], run.storage.swap
    monkeypatch.setattr(run.storage, "swap", lambda name, *rest: written.append(name) or swap(name, *rest))
    state = manifest()
    for index in range(1, 65):
        run.commit(unit(index, index), rows(index, index))
        run.publish(state, lambda: None, everything=False)
        assert indices(run) == list(range(1, index + 1))
    dose = [name for name in written if name.startswith("dose")]
    assert len(dose) < 20
    run.publish(state, lambda: None)
    assert (run.fresh(), indices(run)) == ([], list(range(1, 65)))
    assert state.done == {"code": {"dose": {"chain": [[1, 64]]}}}


def test_publishing_filters_no_rows_for_units_that_do_not_overlap(monkeypatch):
    looked = []
    monkeypatch.setattr(part_files, "_tried", lambda *_: looked.append(1) or pc.field("index") < 0)
    additions = [(unit(first, first + 1), rows(first, first + 1)) for first in range(1, 200, 2)]
    merged = part_files.merged("dose", None, additions)
    assert merged["index"].to_pylist() == list(range(1, 201))
    assert not looked


def test_of_a_table_the_rows_of_some_evaluations_are_read_alone(run):
    for evaluation in ("control", "chain"):
        run.commit(unit(1, 2, evaluation), rows(1, 2, value=float(evaluation == "chain")))
        if evaluation == "control":
            run.publish(manifest(), lambda: None)
    assert run.read("dose", "code")["kl_from_base"].to_pylist() == [1.0, 0.0, 1.0, 0.0]
    assert run.read("dose", "code", of=["chain"])["kl_from_base"].to_pylist() == [1.0, 1.0]
    assert run.read("dose", "code", of=["control"])["kl_from_base"].to_pylist() == [0.0, 0.0]
