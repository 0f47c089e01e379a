"""The manifests of several runs as one table, so that their options can be joined with their rows."""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

_TEXTS = ("model", "revision", "dtype", "base", "solver", "prompt", "system_prompt", "radius")
_NUMBERS = ("seed", "source_layer", "target_layer", "num_vectors", "z_from")

SCHEMA = pa.schema(
    [("run_id", pa.string()), ("created", pa.string()), ("status", pa.string())]
    + [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.int64()) for name in _NUMBERS]
    + [("seconds", pa.float64()), ("config", pa.string())]
)
"""Columns of the view `runs`: the options as given (`radius` may be `auto`); `config` has all of them as JSON."""


def run_table(manifests: Iterable[bytes]) -> pa.Table:
    """A row for each manifest; one of another release may lack options, and one that is no JSON has no row."""
    return pa.Table.from_pylist([row for data in manifests if (row := _row(data))], schema=SCHEMA)


def _row(data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        config = manifest.get("config", {})
    except (ValueError, AttributeError):
        return {}
    texts = {name: None if config.get(name) is None else str(config[name]) for name in _TEXTS}
    facts = {name: manifest.get(name) for name in ("run_id", "created", "status", "seconds")}
    return {**facts, **texts, **{name: config.get(name) for name in _NUMBERS}, "config": json.dumps(config)}
