"""The concepts, as data: a prompt to train on, prompts held out, continuations that show the behaviour."""

import tomllib
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from melbo_ray.errors import UserError


class Concept(BaseModel):
    """What a steering vector is meant to bring about.

    `concept_score` is the mean log-probability per token of `continuations` after the prompt, steered, minus the
    same unsteered (nats per token): above 0 means that steering makes the behaviour likelier.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name: the partition `concept=<name>`."""
    prompt: str = Field(min_length=1)
    """The prompt that the chain is trained on."""
    continuations: list[str] = Field(min_length=1)
    """Openings of answers that show the behaviour; their log-probability is the concept score."""
    words: list[str] = Field(min_length=1)
    """Words and marks (matched whole, case-insensitively) whose presence in a text is evidence of the concept."""
    contrast: list[str] = Field(default=[])
    """Prompts that ask for the behaviour; against the neutral prompts they give the base `contrast`."""
    texts: list[str] = Field(default=[])
    """Passages about the concept, for the presence evaluation."""
    held_out: dict[str, str] = Field(default_factory=lambda: _shared()["held_out"], min_length=1)
    """Prompts the chain never sees: name to text."""
    neutral: list[str] = Field(default_factory=lambda: _shared()["neutral"], min_length=1, validate_default=True)
    """Prompts that ask for nothing of the kind, none of them held out."""
    neutral_texts: list[str] = Field(default_factory=lambda: _shared()["neutral_texts"])
    """Passages that have nothing to do with the concept."""

    @field_validator("neutral")
    @classmethod
    def _check_neutral(cls, neutral: list[str], given: ValidationInfo) -> list[str]:
        if both := set(neutral) & set(given.data.get("held_out", {}).values()):
            raise ValueError(f"{min(both)!r} is a held-out prompt, too: a base made of it has seen it")
        return neutral


def load_concept(name: str) -> Concept:
    """The concept that ships as `name`, or the one in the TOML file `name`.

    Raises:
        UserError: no such concept or file, or a field missing, misspelt or ill-typed.
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
