"""The evaluations: one module a question, each a pure function from a study and a batch of vectors to Arrow rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from melbo_ray.concepts import Concept
from melbo_ray.config import Config
from melbo_ray.model import LanguageModel


@dataclass(frozen=True)
class Study:
    """What every evaluation of one concept's vectors shares.

    Attributes:
        model: the whole model.
        config: the options of the run.
        concept: the concept under study.
        run_id: goes into every row.
        base: θ₀, (d_model,) float32.
    """

    model: LanguageModel
    config: Config
    concept: Concept
    run_id: str
    base: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class Vectors:
    """Some vectors of one kind.

    Attributes:
        kind: `base`, `chain`, `unsteered`, `random`, `shuffled`: what the directions are.
        index: position of each within its kind.
        theta: (len(index), d_model) float32.
    """

    kind: str
    index: Sequence[int]
    theta: Float[Tensor, "n d_model"]
