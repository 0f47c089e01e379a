"""The sidecar of an exported file, `<file>.sidecar.json`: what its vectors are and what they should do."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from melbo_ray.errors import UserError

SUFFIX = ".sidecar.json"


class _Facts(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True, extra="forbid")


class Site(_Facts):
    """Where the vectors are added: to the residual stream after a decoder layer."""

    layer: int
    """Decoder layer to whose output the vectors are added, counted from 0."""
    module: str
    """The same in transformers: the module whose output is steered, as in `model.layers.8`."""
    hidden_states: int
    """The same in transformers' `hidden_states`."""
    hook: str
    """The same in TransformerLens, as in `blocks.8.hook_resid_post`."""


class Model(_Facts):
    """The model that the vectors were found on."""

    name: str
    """As `Config.model`."""
    revision: str | None
    """As `Config.revision`."""
    dtype: str
    """As `Config.dtype`."""
    model_type: str
    """Family, as in transformers' configuration."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of decoder layers."""
    fingerprint: str | None
    """Hash of its configuration and weights (`fingerprint`); None if no worker of the run had the whole model."""


class Prompt(_Facts):
    """The training prompt, as the model read it."""

    text: str
    """In the chat template, up to the model's turn."""
    tokens: list[int]
    """Its token ids."""


class Expected(_Facts):
    """The next token's distribution after the training prompt under a vector, as the run measured it."""

    top_tokens: list[str]
    """The ten most likely tokens."""
    top_probs: list[float]
    """Their probabilities."""
    kl_from_unsteered: float
    """KL(P_n‖P_unsteered), nats."""
    kl_from_base: float
    """KL(P_n‖P_base), nats."""


class Exported(_Facts):
    """One vector of the file."""

    index: int
    """Its index: 0 is the base, the chain counts from 1."""
    norm: float
    """‖θ‖ (residual-stream units)."""
    expected: Expected | None
    """None if the run has not evaluated `kl` for it."""


class Sidecar(_Facts):
    """What an exported file holds; its vectors are in the order of `vectors`."""

    format: str
    """The format, as in the option `format` of the export."""
    run_id: str
    """Name of the run."""
    concept: str
    """Name of the concept."""
    site: Site
    """Where the vectors are added."""
    operation: Literal["add"] = "add"
    """What is done with a vector."""
    scale: float = 1.0
    """Factor of a vector; at 1 it has its own norm."""
    token_scope: Literal["all"] = "all"
    """The tokens steered: every position of prompt and continuation."""
    model: Model
    """The model."""
    prompt: Prompt | None
    """The training prompt; None in runs of earlier releases."""
    vectors: list[Exported]
    """The vectors, in order."""
    use: dict[str, str]
    """How a tool takes the file: code by tool."""

    def encode(self) -> str:
        """The text of the sidecar, indented JSON."""
        return json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def beside(cls, path: str) -> Self | None:
        """The sidecar of the file at `path`; None if it has none.

        Raises:
            UserError: the sidecar is malformed.
        """
        place = Path(path + SUFFIX)
        if not place.is_file():
            return None
        try:
            return cls.model_validate_json(place.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{str(place)!r} is not a sidecar: {where}: {first['msg']}") from None
