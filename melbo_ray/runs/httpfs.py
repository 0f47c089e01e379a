"""DuckDB's own reader of object storage, where it is installed."""

import re
from typing import Any

import duckdb
import fsspec
import fsspec.asyn

from melbo_ray.errors import UserError


def load_httpfs(db: duckdb.DuckDBPyConnection, fs: Any) -> bool:
    """Load DuckDB's S3 reader with the endpoint and credentials of s3fs; False if it is not installed."""
    if "s3" not in fs.protocol:
        return False
    try:
        db.execute("LOAD httpfs")
    except duckdb.Error:
        return False
    fs.connect()
    endpoint, keys = fs.s3.meta.endpoint_url, fsspec.asyn.sync(fs.loop, fs.session.get_credentials)
    options = {
        "ENDPOINT": re.sub(r"^https?://", "", endpoint),
        "REGION": fs.s3.meta.region_name,
        "URL_STYLE": "vhost" if endpoint.endswith("amazonaws.com") else "path",
        "KEY_ID": keys and keys.access_key,
        "SECRET": keys and keys.secret_key,
        "SESSION_TOKEN": keys and keys.token,
    }
    given = "".join(f", {name} {quote(value)}" for name, value in options.items() if value)
    try:
        db.execute(f"CREATE SECRET (TYPE s3, USE_SSL {endpoint.startswith('https')}{given})")
    except duckdb.Error:  # its message may quote the statement, and with it the secret
        raise UserError("DuckDB refused the S3 credentials: uninstall its httpfs to read through s3fs") from None
    return True


def quote(text: str) -> str:
    """The text as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"
