"""`run.json`, typed: what a run is, what it was made with, and how far it has come."""

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
    """A prompt as the model reads it: in its chat template, and as tokens."""

    text: str
    tokens: list[int]


Rendered = dict[str, dict[str, RenderedPrompt]]
"""Prompts by concept and name; `training` is the training prompt's."""


@dataclass(frozen=True)
class Packed:
    """Whether each kind of worker holds packed copies of its weights; results differ in the last bits by it."""

    chain: bool = True
    evaluator: bool = True


ALL_PACKED = Packed()


class Outcome(BaseModel):
    """What has come of a concept; on disk is what is known."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    vectors: int = 0
    """Length of the chain."""
    stop_reason: str | None = None
    """Why the chain ended; None while it goes on."""
    max_abs_cos: float | None = None
    """Largest |cos| of any two of θ₀ and the chain, float64; audited when the run ends."""
    failures: int | None = None
    """Rows of the table `failures`, when the run ended."""

    @model_serializer(mode="wrap")
    def _known(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class Manifest(BaseModel):
    """`run.json`. What another release has put there beside these fields stays."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="allow")

    schema_version: int = SCHEMA_VERSION
    """Of the tables and of this file."""
    run_id: str = ""
    """Name of the run and of its folder."""
    created: str | None = None
    """When it was begun, ISO 8601 in UTC."""
    model: str | None = None
    """As `Config.model`."""
    revision: str | None = None
    """As `Config.revision`."""
    fingerprint: str | None = None
    """Of the whole model's weights; None until a worker has read them."""
    lower_fingerprint: str | None = None
    """Of the layers up to the target."""
    seed: int | None = None
    """As `Config.seed`."""
    hardware: dict[str, str] = {}
    """Device by host."""
    checks: Checks = {}
    """Self-checks of the workers."""
    prompts_rendered: Rendered = {}
    """As the run was begun with: a chat template may write today's date."""
    peak_memory: dict[str, int] = {}
    """The most that a `chain` actor and an `evaluator` have taken, bytes."""
    seconds: float = 0.0
    """Wall time that drivers have spent on the run."""
    concepts: dict[str, Outcome] = {}
    """What has come of each concept."""
    done: Coverage = {}
    """What is published."""
    config: dict[str, Any] = {}
    """Every option by its name in `Config`; a mapping, since a run of another release may have others."""
    definitions: dict[str, dict[str, Any]] = {}
    """The fields of each `Concept`; a mapping for the same reason."""
    prompts: dict[str, dict[str, str]] = {}
    """Text of each prompt, by concept and name."""
    status: Literal["running", "interrupted", "finished"] = "running"
    """What the last driver left; `running` with no lease held is a driver that was killed."""
    versions: dict[str, str] = {}
    """Of Python and the packages that figures depend on."""
    packed: Packed = ALL_PACKED
    """What a resumed run packs at most."""
    updated: str | None = None
    """When it was last written, ISO 8601 in UTC."""

    @classmethod
    def decode(cls, data: bytes, url: str) -> Self:
        """The manifest in the bytes of `<url>/run.json`.

        Raises:
            UserError: it is no manifest, or one of another schema version.
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
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{url}/run.json is not the manifest of a run: {place}: {first['msg']}") from None

    def encode(self) -> bytes:
        """What stands in `run.json`: JSON with an indent, token ids on one line."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        # A break inside a string would be escaped.
        return re.sub(r"\[\n[\d\s,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text).encode()
