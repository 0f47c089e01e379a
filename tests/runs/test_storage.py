"""Storage: bytes at names on a local directory, in memory, on servers of S3, GCS and Azure; S3's behind faults."""

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

import melbo_ray.runs.local_files
import melbo_ray.runs.object_stores
from melbo_ray.errors import UserError
from melbo_ray.runs.object_stores import has_secret, mask
from melbo_ray.runs.storage import Storage, StorageError
from tests.s3 import environment, faulty


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


def test_many_are_read_at_once_in_order(url):
    storage = Storage(url)
    for number in range(50):
        storage.put(f"a/{number}", b"%d" % number)
    names = [f"a/{number}" for number in range(49, -1, -1)]
    assert list(storage.get_many([*names, "a/none"])) == [*(name[2:].encode() for name in names), None]


@pytest.mark.parametrize("refused", [False, True])
def test_many_are_deleted_on_s3_in_one_request_or_one_by_one_where_that_is_refused(s3, refused):
    with faulty(s3) as (variables, faults), environment(variables):
        storage = Storage(f"s3://bucket/{uuid.uuid4().hex}/one")
        names = [f"units/a b+{number}.zip" for number in range(40)]
        for name in names:
            storage.put(name, b"x")
        before = faults.served
        faults.waiting += [(501, "NotImplemented")] if refused else []
        storage.delete([*names, "units/none"])
        assert faults.served - before == (1 + 41 if refused else 1)
        assert storage.names() == []


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


def test_a_replacement_by_an_old_version_is_refused_where_storage_can(url):
    storage = Storage(url)
    assert storage.version("a/x y") is None
    storage.swap("a/x y", b"one", None)
    seen = storage.version("a/x y")
    storage.swap("a/x y", b"two", seen)
    assert storage.get("a/x y") == b"two"
    with pytest.raises(StorageError):
        storage.swap("a/x y", b"created", None)
    if urlsplit(url).scheme in ("", "memory"):
        assert seen == ""  # said in docs/cluster.md: unconditional
        return
    with pytest.raises(StorageError):
        storage.swap("a/x y", b"late", seen)
    assert storage.get("a/x y") == b"two"
    storage.swap("a/x y", b"two", seen)  # as a repeated request whose first answer was lost


def test_of_many_that_replace_one_version_one_succeeds(bucket_url):
    Storage(bucket_url).put("x", b"old")
    version, outcomes = Storage(bucket_url).version("x"), []

    def replace(number):
        with contextlib.suppress(StorageError):
            Storage(bucket_url).swap("x", str(number).encode(), version)
            outcomes.append(str(number).encode())

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Storage(bucket_url).get("x")]


def test_bytes_arrive_as_they_are(bucket_url):
    storage, data = Storage(bucket_url), b"\r\n--==0==--\r\n\x00\xff" + os.urandom(300_000)
    storage.put("x", b"old")
    storage.swap("x", data, storage.version("x"))
    assert storage.get("x") == data


def test_what_a_killed_creator_left_is_taken_over_without_links(tmp_path, monkeypatch, no_links):
    monkeypatch.setattr(melbo_ray.runs.local_files, "_ABANDONED", 0.0)
    (tmp_path / ".partial-x").write_bytes(b"half an obj")
    storage = Storage(str(tmp_path))
    assert (storage.get("x"), storage.names()) == (None, [])
    assert storage.create("x", b"whole")
    assert (storage.get("x"), os.listdir(tmp_path)) == (b"whole", ["x"])


def test_a_creator_that_stalled_does_not_replace_what_another_created(tmp_path, monkeypatch, no_links):
    monkeypatch.setattr(melbo_ray.runs.local_files, "_ABANDONED", 0.0)
    storage, exists = Storage(str(tmp_path)), Path.exists

    def stall(path):
        monkeypatch.setattr(Path, "exists", exists)
        assert Storage(str(tmp_path)).create("x", b"other")
        return exists(path)

    monkeypatch.setattr(Path, "exists", stall)
    assert not storage.create("x", b"mine")
    assert (storage.get("x"), os.listdir(tmp_path)) == (b"other", ["x"])


def test_a_writer_killed_midway_leaves_nothing_to_be_seen(tmp_path):
    script = "import sys; from melbo_ray.runs.storage import Storage; s = Storage(sys.argv[1])"
    script += "\nwhile True: s.put('x', b'y' * 30_000_000)"
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    storage = Storage(str(tmp_path))
    while storage.get("x") is None:
        time.sleep(0.01)
    for _ in range(20):
        assert len(storage.get("x") or b"") == 30_000_000
    writer.kill()
    writer.wait()
    assert storage.names() == ["x"]
    storage.sweep()
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIA:hunter2@bucket/x",
        "sftp://me:hunter2@host/x",
        "https://host/x?sig=hunter2",
        "abfs://c@hunter2.net/x",
        "abfs://container:hunter2@account.dfs.core.windows.net/x",
        "abfs://hunter2==@account.dfs.core.windows.net/x",
        "abfs://container@account.dfs.core.windows.net/x?sig=hunter2",
        "abfs://container@account.dfs.core.windows.net@hunter2.net/x",
        "s3://hunter2@account.dfs.core.windows.net/x",
    ],
)
def test_a_url_with_a_credential_is_refused_and_not_repeated(place):
    with pytest.raises(UserError, match="credential") as caught:
        Storage(place)
    assert "hunter2" not in str(caught.value).replace("hunter2.net", "")


def test_a_container_of_an_azure_account_is_no_credential(azure):
    storage = Storage(f"{azure}/{uuid.uuid4().hex}")
    storage.put("x", b"y")
    assert (storage.get("x"), storage.names(), storage.shared) == (b"y", ["x"], True)
    inside = storage.url.partition(".net/")[2]
    assert Storage(f"abfss://container/{inside}").get("x") == b"y"  # the account from the environment


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "az"])
@pytest.mark.parametrize("host", ["dfs", "blob"])
def test_an_azure_address_is_told_from_a_credential(scheme, host):
    place = f"{scheme}://my-container@account1.{host}.core.windows.net/runs/x"
    assert not has_secret(place)
    assert mask(f"{place}?sig=hunter2") == place


@pytest.mark.parametrize(
    ("store", "place"), [("gcs", "gs://none/x"), ("azure", "abfs://none@tester.dfs.core.windows.net/x")]
)
def test_a_missing_bucket_is_one_line(store, place, request):
    request.getfixturevalue(store)
    assert Storage(place).names() == []
    with pytest.raises(StorageError, match="no such bucket") as caught:
        Storage(place).put("y", b"z")
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="nosuch") as caught:
        Storage("nosuch://bucket/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("url", "extra"), [("s3://b/r", "cluster"), ("gs://b/r", "gcs"), ("abfs://b/r", "azure")])
def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch, url, extra):
    def missing(*_, **__):
        raise ImportError("Install it to access the store")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=rf"Install it to access the store: pip install 'melbo-ray\[{extra}\]'"):
        Storage(url)


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
    monkeypatch.setattr(melbo_ray.runs.object_stores, "_READ_SECONDS", 1)
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
