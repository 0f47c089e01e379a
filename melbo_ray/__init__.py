"""MELBO-ortho as a distributed batch job. It finds and evaluates orthogonal steering vectors of the same effect."""

import importlib
import sys
from typing import Any

if sys.platform == "win32":
    raise ImportError("melbo_ray runs on Linux and macOS; on Windows use it inside WSL 2")

# Imported on first access: a job that only reads a run must not wait for torch and transformers.
_HOMES = {
    "BaseOptions": "config",
    "Candidate": "search.candidates",
    "ChainOptions": "config",
    "Concept": "concepts.loader",
    "Config": "config",
    "LanguageModel": "model.language_model",
    "Slice": "model.residual_slice",
    "SteeringVector": "search.vectors",
    "UserError": "errors",
    "base_vector": "search.base_vectors",
    "chain": "search.chain",
    "load_concept": "concepts.loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
