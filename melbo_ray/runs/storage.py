"""Objects under one fsspec URL, with atomic writes, retries, and one-line errors.

On object stores an object is written by one PUT; on a local file system by a temporary file, fsync and rename. Retries
on S3 are botocore's (standard mode: bounded exponential backoff with jitter); other file systems use their own.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from melbo_ray.errors import UserError, first_line

_PATIENT, _BRISK = 10, 3
_READ_SECONDS = 20
_FINAL = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, it resumes",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, it resumes",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
}
_TEMPORARY = ".partial-"


class StorageError(UserError):
    """Storage refused a request or is unreachable; written objects are kept, and the same command resumes."""


class Storage:
    """A folder at a local path or fsspec URL, whose objects have relative names with `/`.

    Args:
        url: local path or fsspec URL. Credentials come from the environment or the instance role, never from the URL.
        patient: whether to retry transient faults for a minute or two, as in a running job, or only for seconds.

    Raises:
        UserError: the URL contains a password, or its protocol is not installed.
        StorageError: raised by every method: access denied, no bucket, unreachable, disk full.
    """

    def __init__(self, url: str, patient: bool = True) -> None:
        if _has_secret(url):
            raise UserError(
                f"the storage URL {mask(url)!r} holds a credential: put it into the environment "
                "(for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or use an instance role"
            )
        options = _s3_options(_PATIENT if patient else _BRISK) if url.startswith(("s3://", "s3a://")) else {}
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            remedy = ": pip install 'melbo-ray[cluster]'" if options and isinstance(error, ImportError) else ""
            raise UserError(f"storage {url!r}: {error}{remedy}") from None
        self._s3 = bool(options)
        if self._s3:
            self._fs.retries = 1  # botocore retries already; both together would multiply
        self._local = isinstance(self._fs, LocalFileSystem)
        self._root = root.rstrip("/")
        self.url = self._root if self._local else url.rstrip("/")

    @property
    def shared(self) -> bool:
        """Whether other machines can see the objects."""
        return not self._local and self._fs.protocol not in ("memory", ("memory",))

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object atomically."""
        with self._explained(name):
            if self._local:
                with self._temporary(name, data) as temporary:
                    os.replace(temporary, self._path(name))
                    _sync_folder(Path(self._path(name)).parent)
            else:
                self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist yet; of several writers, one succeeds.

        Returns whether the object now holds `data`, which is also True if an earlier attempt with the same bytes had
        succeeded and only its response was lost.
        """
        try:
            with self._explained(name):
                self._create(name, data)
            return True
        except StorageError as error:
            # An existing object raises FileExistsError on some stores and OSError(EINVAL) on others, so read it.
            found = self.get(name)
            if found is None:
                raise error from None
            return found == data

    def version(self, name: str) -> str | None:
        """The version of an object for `swap`: its ETag on S3, "" on other storage, None if there is no object."""
        with self._explained(name):
            self._fs.invalidate_cache()
            try:
                found = self._fs.info(self._path(name))
                return found["ETag"] if self._s3 else ""
            except (FileNotFoundError, NotADirectoryError):
                return None

    def swap(self, name: str, data: bytes, version: str | None) -> None:
        """Replace an object if it still has this version, or create it for None.

        Raises:
            StorageError: as every method; or the object has another version now.
        """
        if version == "":
            self.put(name, data)
            return
        try:
            with self._explained(name):
                if version is None:
                    self._create(name, data)
                else:
                    self._fs.pipe_file(self._path(name), data, IfMatch=version)
        except StorageError:
            if self.get(name) != data:  # else an earlier attempt succeeded, and its response was lost
                raise

    def get(self, name: str) -> bytes | None:
        """The object's bytes; None if there is no such object."""
        with self._explained(name):
            try:
                return self._fs.cat_file(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects below `folder`, sorted, from an uncached listing."""
        with self._explained(folder):
            self._fs.invalidate_cache()
            base = self._path(folder) if folder else self._root
            try:
                found = self._fs.find(base)
            except (FileNotFoundError, NotADirectoryError):
                return []
        root = self._fs._strip_protocol(self._root)
        # Some stores keep an emptied folder as an object with the folder's name.
        inside = (path for path in found if path.startswith(f"{self._fs._strip_protocol(base)}/"))
        return sorted(path[len(root) + 1 :] for path in inside if not path.rpartition("/")[2].startswith(_TEMPORARY))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""
        for name in names:
            with self._explained(name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def sweep(self) -> None:
        """Delete temporary files of killed writers (local file systems only)."""
        if self._local:
            for path in Path(self._root).rglob(f"{_TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def prune(self) -> None:
        """Delete the folder if it contains only empty folders (local file systems only)."""
        if self._local:
            for path in sorted(Path(self._root).rglob("*"), reverse=True):
                with contextlib.suppress(OSError):  # no folder, or not empty
                    path.rmdir()
            with contextlib.suppress(OSError):
                Path(self._root).rmdir()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _create(self, name: str, data: bytes) -> None:
        if not self._local:
            self._fs.pipe_file(self._path(name), data, mode="create")
            return
        with self._temporary(name, data) as temporary:
            # A link fails if the name exists, and is atomic; O_EXCL would create an empty file first.
            os.link(temporary, self._path(name))
            _sync_folder(Path(self._path(name)).parent)

    @contextlib.contextmanager
    def _temporary(self, name: str, data: bytes) -> Generator[Path]:
        folder = Path(self._path(name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            raise StorageError(f"storage {self.url}: {_explain(error)} (at {name or 'its root'})") from error


def mask(url: str) -> str:
    """The URL without user information and query, which may contain credentials."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else url


def _has_secret(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.scheme) and ("@" in parts.netloc or bool(parts.query))


def _explain(error: Exception) -> str:
    code = getattr(error, "errno", None)
    kind, text = type(error).__name__, first_line(error)
    if code in _FINAL:
        return _FINAL[code]
    if isinstance(error, PermissionError):
        return f"access denied: {text}"
    if isinstance(error, FileNotFoundError):
        return f"no such bucket or directory: {text}"
    if "Credential" in kind or "ProfileNotFound" in kind:
        return f"no credentials: {text}"
    if "Connect" in kind or "Timeout" in kind or "HTTPClientError" in kind:
        return f"cannot be reached: {text}"
    return f"{kind}: {text}"


def _s3_options(attempts: int) -> dict:
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return {"config_kwargs": {"retries": retries, "connect_timeout": 5, "read_timeout": _READ_SECONDS}}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
