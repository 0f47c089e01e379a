"""Atomic writes on a local or mounted file system: a temporary file, fsync, and one step that gives it its name."""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".partial-"
"""Prefix of the names of files that are being written, and of what killed writers leave."""

_ABANDONED = 30.0
# What link(2) answers on FAT, exFAT and many network and FUSE file systems.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def replace(path: Path, data: bytes) -> None:
    """Write or replace a file; readers see the old content or the new."""
    with _written(path.parent / f"{TEMPORARY}{uuid.uuid4().hex}", data) as temporary:
        os.replace(temporary, path)
    _sync(path.parent)


def create(path: Path, data: bytes) -> None:
    """Write a file that must not exist; readers see nothing or all of it.

    Raises:
        FileExistsError: it exists.
    """
    try:
        with _written(path.parent / f"{TEMPORARY}{uuid.uuid4().hex}", data) as temporary:
            # A link fails if the name exists, and is atomic; O_EXCL on the name would show an empty file first.
            os.link(temporary, path)
        temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _create_without_links(path, data)
    _sync(path.parent)


def _create_without_links(path: Path, data: bytes) -> None:
    """As `create`, where files have one name: all writers of `path` share a temporary file, opened with O_EXCL.

    Only its owner may look whether `path` is free and rename the file to it, which also lets the next writer in.
    """
    with _written(path.parent / f"{TEMPORARY}{path.name}", data) as temporary:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)


@contextlib.contextmanager
def _written(temporary: Path, data: bytes) -> Generator[Path]:
    """A new file with `data`, on disk; the body renames it or deletes it, unless it raises."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    file = _claim(temporary)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _claim(path: Path) -> BinaryIO:
    """Open a file that does not exist, waiting for its owner; after `_ABANDONED` s that owner counts as killed."""
    deadline = time.monotonic() + _ABANDONED
    while True:
        try:
            return path.open("xb")
        except FileExistsError:
            if time.monotonic() > deadline:
                path.unlink(missing_ok=True)
        time.sleep(0.01)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
