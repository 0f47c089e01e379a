"""Deleting many objects on S3, a thousand per request (DeleteObjects)."""

from collections.abc import Sequence
from typing import Any

_MOST = 1000


def delete_at_once(fs: Any, paths: Sequence[str]) -> list[str]:
    """Delete objects on S3 in few requests; returns the paths that are left, which are all of them on other storage.

    What the store refuses is left, too: it tells why when it is asked for a single object.
    """
    if "s3" not in fs.protocol:
        return list(paths)
    return [left for i in range(0, len(paths), _MOST) for left in _delete(fs, paths[i : i + _MOST])]


def _delete(fs: Any, paths: Sequence[str]) -> list[str]:
    bucket = fs.split_path(paths[0])[0]
    keys = {fs.split_path(path)[1]: path for path in paths}
    objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    try:
        answer = fs.call_s3("delete_objects", Bucket=bucket, Delete=objects)
    except Exception:  # not every store has this request
        return list(paths)
    return [keys[error["Key"]] for error in answer.get("Errors", [])]
