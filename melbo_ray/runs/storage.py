"""Objects under one fsspec URL, with atomic writes, retries, and one-line errors.

On object stores an object is written by one PUT; on a local file system by a temporary file, fsync and rename. Retries
on S3 are botocore's (standard mode: bounded exponential backoff with jitter); other file systems use their own.
Creation is conditional everywhere, replacement on S3, GCS and Azure (docs/cluster.md has the table).
"""

import contextlib
import errno
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from melbo_ray.errors import UserError, first_line
from melbo_ray.runs import local_files, object_stores
from melbo_ray.runs.bulk_delete import delete_at_once
from melbo_ray.runs.local_files import TEMPORARY

_FINAL = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, it resumes",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, it resumes",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
}


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
        if object_stores.has_secret(url):
            raise UserError(
                f"the storage URL {object_stores.mask(url)!r} holds a credential: put it into the environment "
                "(for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or use an instance role"
            )
        try:
            self._fs, root = object_stores.connect(url, patient)
        except (ValueError, ImportError) as error:
            raise UserError(f"storage {url!r}: {error}{object_stores.remedy(url, error)}") from None
        self._local = isinstance(self._fs, LocalFileSystem)
        self._root = root.rstrip("/")
        self.url = self._root if self._local else url.rstrip("/")
        self._threads = ThreadPoolExecutor(object_stores.CONNECTIONS, thread_name_prefix="storage")

    @property
    def shared(self) -> bool:
        """Whether other machines can see the objects."""
        return not self._local and self._fs.protocol not in ("memory", ("memory",))

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object atomically."""
        with self._explained(name):
            if self._local:
                local_files.replace(Path(self._path(name)), data)
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
        """The version of an object for `swap`; "" where replacement is unconditional, None if there is no object."""
        with self._explained(name):
            self._fs.invalidate_cache()
            try:
                return object_stores.version(self._fs, self._fs.info(self._path(name)))
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
                    object_stores.replace(self._fs, self._path(name), data, version)
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

    def get_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The bytes of several objects in turn, read over several connections; None for those that do not exist."""
        return self._threads.map(self.get, names)

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
        return sorted(path[len(root) + 1 :] for path in inside if not path.rpartition("/")[2].startswith(TEMPORARY))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, on S3 a thousand per request; missing ones are ignored."""

        def delete(path: str) -> None:
            with self._explained(path), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

        list(self._threads.map(delete, delete_at_once(self._fs, [self._path(name) for name in names])))

    def sweep(self) -> None:
        """Delete temporary files of killed writers (local file systems only)."""
        if self._local:
            for path in Path(self._root).rglob(f"{TEMPORARY}*"):
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
        if self._local:
            local_files.create(Path(self._path(name)), data)
        else:
            self._fs.pipe_file(self._path(name), data, mode="create")

    @contextlib.contextmanager
    def _explained(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            raise StorageError(f"storage {self.url}: {_explain(error)} (at {name or 'its root'})") from error


def _explain(error: Exception) -> str:
    code = getattr(error, "errno", None)
    kind, text = type(error).__name__, first_line(error)
    if code in _FINAL:
        return _FINAL[code]
    if isinstance(error, PermissionError) or "Authentication" in kind or text.startswith("Forbidden"):
        return f"access denied: {text}"
    if "Credential" in kind or "ProfileNotFound" in kind:
        return f"no credentials: {text}"
    if isinstance(error, FileNotFoundError) or "NotFound" in kind:
        return f"no such bucket or directory: {text}"
    if "Connect" in kind or "Timeout" in kind or "HTTPClientError" in kind or "ServiceRe" in kind:
        return f"cannot be reached: {text}"
    return f"{kind}: {text}"
