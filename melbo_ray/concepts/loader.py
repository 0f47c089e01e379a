"""Concepts as data: a training prompt, held-out prompts, and continuations that show the behaviour."""

import tomllib
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from melbo_ray.errors import UserError


class Concept(BaseModel):
    """A behaviour that steering vectors should elicit.

    Its `concept_score` is the mean log-probability per token of `continuations` after the prompt, steered minus
    unsteered (nats per token); a positive score means that steering makes the behaviour more likely.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name, which is the partition `concept=<name>`."""
    prompt: str = Field(min_length=1)
    """Training prompt of the chain."""
    continuations: list[str] = Field(min_length=1)
    """Openings of answers that show the behaviour, from which the concept score is computed."""
    words: list[str] = Field(min_length=1)
    """Words and marks (matched whole, case-insensitively) that are evidence of the concept in a text."""
    contrast: list[str] = Field(default=[])
    """Prompts that ask for the behaviour; with the neutral prompts they give the base `contrast`."""
    texts: list[str] = Field(default=[])
    """Passages about the concept, for the evaluation `presence`."""
    held_out: dict[str, str] = Field(default_factory=lambda: _shared()["held_out"], min_length=1)
    """Held-out prompts, which the chain never sees: name to text."""
    neutral: list[str] = Field(default_factory=lambda: _shared()["neutral"], min_length=1, validate_default=True)
    """Prompts unrelated to the behaviour, none of them held out."""
    neutral_texts: list[str] = Field(default_factory=lambda: _shared()["neutral_texts"])
    """Passages unrelated to the concept."""

    @field_validator("neutral")
    @classmethod
    def _check_neutral(cls, neutral: list[str], given: ValidationInfo) -> list[str]:
        if both := set(neutral) & set(given.data.get("held_out", {}).values()):
            raise ValueError(f"{min(both)!r} is a held-out prompt, too: a base made of it has seen it")
        return neutral


def load_concept(name: str) -> Concept:
    """Load the packaged concept `name`, or the concept in the TOML file `name`.

    Raises:
        UserError: no such concept or file, or a field is missing, unknown or of the wrong type.
    """
    folder = files("melbo_ray.concepts")
    shipped = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    shipped.remove("shared")
    try:
        if name in shipped:
            return Concept(**tomllib.loads((folder / f"{name}.toml").read_text("utf-8")))
        if not name.endswith(".toml"):
            raise UserError(f"no concept {name!r}: expected one of {', '.join(shipped)}, or the path of a TOML file")
        return Concept(**tomllib.loads(Path(name).read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the concept {name!r}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"the concept {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _shared() -> dict:
    return tomllib.loads((files("melbo_ray.concepts") / "shared.toml").read_text("utf-8"))
