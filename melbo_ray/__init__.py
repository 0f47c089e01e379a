"""MELBO-ortho as a distributed batch job. It finds and evaluates orthogonal steering vectors of the same effect."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("melbo_ray runs on Linux and macOS; on Windows use it inside WSL 2")

if TYPE_CHECKING:
    from melbo_ray.concepts.loader import Concept, load_concept
    from melbo_ray.config import BaseOptions, ChainOptions, Config
    from melbo_ray.errors import UserError
    from melbo_ray.model.language_model import LanguageModel
    from melbo_ray.model.residual_slice import Slice
    from melbo_ray.model.steer import steer
    from melbo_ray.runs.run_store import Run
    from melbo_ray.runs.vectors import RunVector, RunVectors
    from melbo_ray.search.base_vectors import base_vector
    from melbo_ray.search.candidates import Candidate
    from melbo_ray.search.chain import chain
    from melbo_ray.search.vectors import SteeringVector

# Imported on first access: a job that only reads a run must not wait for torch and transformers.
_HOMES = {
    "BaseOptions": "config",
    "Candidate": "search.candidates",
    "ChainOptions": "config",
    "Concept": "concepts.loader",
    "Config": "config",
    "LanguageModel": "model.language_model",
    "Run": "runs.run_store",
    "RunVector": "runs.vectors",
    "RunVectors": "runs.vectors",
    "Slice": "model.residual_slice",
    "SteeringVector": "search.vectors",
    "UserError": "errors",
    "base_vector": "search.base_vectors",
    "chain": "search.chain",
    "load_concept": "concepts.loader",
    "steer": "model.steer",
}
__all__ = [
    "BaseOptions",
    "Candidate",
    "ChainOptions",
    "Concept",
    "Config",
    "LanguageModel",
    "Run",
    "RunVector",
    "RunVectors",
    "Slice",
    "SteeringVector",
    "UserError",
    "base_vector",
    "chain",
    "load_concept",
    "steer",
]


if not TYPE_CHECKING:  # to a type checker an unknown name is an error

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
