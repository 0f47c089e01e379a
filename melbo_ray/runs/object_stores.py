"""What differs among fsspec's object stores: options, credentials in URLs, versions and conditional replacement."""

import json
import os
import re
from typing import Any
from urllib.parse import urlsplit

import fsspec

_PATIENT, _BRISK = 10, 3
_CONNECT_SECONDS, _READ_SECONDS = 5, 20
CONNECTIONS = 32
"""Requests at once."""
_S3, _GCS, _AZURE = ("s3", "s3a"), ("gs", "gcs"), ("abfs", "abfss", "az")
_VERSIONS = {"s3": "ETag", "gs": "generation", "abfs": "etag"}
# `container@account` is Azure's form of an address; the names are too restricted for a key to pass as one.
_CONTAINER = re.compile(r"(\$root|\$web|[a-z0-9](-?[a-z0-9]){2,62})@[a-z0-9]{3,24}\.(dfs|blob)\.core\.windows\.net")


def connect(url: str, patient: bool) -> tuple[Any, str]:
    """The file system of a URL and the path in it; S3's retries are bounded by `patient`, others' are their own.

    Raises:
        ValueError, ImportError: unknown protocol, package not installed, no account.
    """
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme in _S3:
        retries = {"mode": "standard", "total_max_attempts": _PATIENT if patient else _BRISK}
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        options = {"config_kwargs": {"retries": retries, "max_pool_connections": CONNECTIONS, **timeouts}}
    elif scheme in _AZURE:
        options = {"connection_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
    elif scheme in _GCS:
        # gcsfs would ask for each bucket's layout, for zonal ones, whose uploads have no condition on a generation.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    fs, root = fsspec.core.url_to_fs(url, **options)
    if scheme in _S3:
        fs.retries = 1  # botocore retries already; both together would multiply
    return fs, root


def remedy(url: str, error: Exception) -> str:
    """What installs the package that a URL's protocol lacks; empty for other errors and protocols."""
    extras = dict.fromkeys(_S3, "cluster") | dict.fromkeys(_AZURE, "azure") | dict.fromkeys(_GCS, "gcs")
    extra = extras.get(urlsplit(url).scheme)
    return f": pip install 'melbo-ray[{extra}]'" if extra and isinstance(error, ImportError) else ""


def version(fs: Any, info: dict[str, Any]) -> str:
    """The version of an object: ETag on S3 and Azure, generation on GCS; "" where replacement is unconditional."""
    key = _VERSIONS.get(_kind(fs))
    return info[key] if key else ""


def replace(fs: Any, path: str, data: bytes, version: str) -> None:
    """Replace an object that still has this version.

    Raises:
        Exception: the store's own, also if the object has another version now.
    """
    match _kind(fs):
        case "s3":
            fs.pipe_file(path, data, IfMatch=version)
        case "gs":
            _replace_generation(fs, path, data, version)
        case "abfs":
            from azure.core import MatchConditions

            fs.pipe_file(path, data, etag=version, match_condition=MatchConditions.IfNotModified)


def mask(url: str) -> str:
    """The URL without user information, except an Azure container, and query, which may contain credentials."""
    parts = urlsplit(url)
    host = parts.netloc if _is_container(url) else parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else url


def has_secret(url: str) -> bool:
    """Whether the URL may contain a credential: user information, except an Azure container, or a query."""
    parts = urlsplit(url)
    return bool(parts.scheme) and (("@" in parts.netloc and not _is_container(url)) or bool(parts.query))


def _is_container(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in _AZURE and bool(_CONTAINER.fullmatch(parts.netloc))


def _kind(fs: Any) -> str:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return next((name for name in _VERSIONS if name in protocols), "")


def _replace_generation(fs: Any, path: str, data: bytes, generation: str) -> None:
    """GCS's multipart upload with `ifGenerationMatch`, which gcsfs offers for new objects only (generation 0)."""
    bucket, name, _ = fs.split_path(path)
    described = f"Content-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps({'name': name})}"
    boundary = os.urandom(16).hex()
    body = f"--{boundary}\r\n{described}\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
    fs.call(
        "POST",
        f"{fs.base.removesuffix('storage/v1/')}upload/storage/v1/b/{{}}/o",
        bucket,
        uploadType="multipart",
        ifGenerationMatch=generation,
        headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
        data=body + data + f"\r\n--{boundary}--".encode(),
    )
    fs.invalidate_cache()
