"""The manifest of a run, `run.json`: its configuration, software and progress."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from melbo_ray.errors import UserError
from melbo_ray.runs.checks import Checks
from melbo_ray.runs.schema import SCHEMA_VERSION
from melbo_ray.runs.work_unit import Coverage


class RenderedPrompt(BaseModel):
    """A prompt in the model's chat template, as text and as tokens."""

    text: str
    tokens: list[int]


Rendered = dict[str, dict[str, RenderedPrompt]]
"""Prompts by concept and name; the training prompt has the name `training`."""


@dataclass(frozen=True)
class Packed:
    """Whether each kind of worker holds packed copies of its weights, which changes the last bits of results."""

    chain: bool = True
    evaluator: bool = True


ALL_PACKED = Packed()


class Outcome(BaseModel):
    """The result of a concept; only known fields are written to disk."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    vectors: int = 0
    """Length of the chain."""
    stop_reason: str | None = None
    """Why the chain ended; None while it is running."""
    max_abs_cos: float | None = None
    """Largest |cos| of any two vectors among θ₀, what the chain avoids, and the chain, float64; computed at the end of
    the run."""
    failures: int | None = None
    """Number of rows of the table `failures` at the end of the run."""

    @model_serializer(mode="wrap")
    def _known(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class Manifest(BaseModel):
    """The content of `run.json`; fields written by other releases are kept."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="allow")

    schema_version: int = SCHEMA_VERSION
    """Schema version of the tables and of this file."""
    run_id: str = ""
    """Name of the run and of its folder."""
    created: str | None = None
    """Time of creation, ISO 8601 in UTC."""
    model: str | None = None
    """As `Config.model`."""
    revision: str | None = None
    """As `Config.revision`."""
    fingerprint: str | None = None
    """Fingerprint of the whole model; None until a worker has registered it."""
    lower_fingerprint: str | None = None
    """Fingerprint of the model up to the target layer."""
    seed: int | None = None
    """As `Config.seed`."""
    hardware: dict[str, str] = {}
    """Device by host."""
    checks: Checks = {}
    """Results of the workers' self-checks."""
    prompts_rendered: Rendered = {}
    """Prompts as rendered when the run was created, because a chat template may insert the date."""
    peak_memory: dict[str, int] = {}
    """Peak memory of the workers by role, `chain` or `evaluator`, bytes."""
    seconds: float = 0.0
    """Wall time of all drivers of the run, seconds."""
    concepts: dict[str, Outcome] = {}
    """Result of each concept."""
    done: Coverage = {}
    """The published indices."""
    config: dict[str, Any] = {}
    """Every option by its name in `Config`; untyped, because another release may have other options."""
    definitions: dict[str, dict[str, Any]] = {}
    """The fields of each `Concept`; untyped for the same reason."""
    prompts: dict[str, dict[str, str]] = {}
    """Text of each prompt, by concept and name."""
    status: Literal["running", "interrupted", "finished"] = "running"
    """Status left by the last driver; `running` without a valid lease means that the driver was killed."""
    versions: dict[str, str] = {}
    """Versions of Python and of the packages that affect results."""
    packed: Packed = ALL_PACKED
    """The workers that may hold packed weights when the run is resumed."""
    updated: str | None = None
    """Time of the last write, ISO 8601 in UTC."""

    @classmethod
    def decode(cls, data: bytes, url: str) -> Self:
        """Parse the bytes of `<url>/run.json`.

        Raises:
            UserError: the bytes are not a manifest, or have another schema version.
        """
        try:
            found = json.loads(data)
            version = found["schema_version"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{url}/run.json is not the manifest of a run") from None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{url} has schema version {version}, and this melbo_ray reads {SCHEMA_VERSION}: "
                "use the release that wrote it, or start a new run"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{url}/run.json is not the manifest of a run: {field}: {first['msg']}") from None

    def encode(self) -> bytes:
        """The bytes of `run.json`: indented JSON, with token ids on one line."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        # Line breaks within strings are escaped, so the pattern matches lists of numbers only.
        return re.sub(r"\[\n[\d\s,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text).encode()
