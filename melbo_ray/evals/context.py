"""The common input of the evaluations: model, concept, base, and values computed once from them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts, encode
from melbo_ray.runs import schema

TRAINING = "training"

Row = dict[str, Any]
"""One row of a table, by column."""
Rows = dict[str, list[Row]]
"""Rows by table."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Study:
    """The context of all evaluations of one concept; its properties are computed on first access and cached.

    Attributes:
        model: the whole model.
        config: options of the run.
        concept: the concept under study.
        run_id: name of the run, a column of every row.
        base: θ₀, (d_model,) float32.
        avoided: orthonormal directions that the chain avoids besides θ₀; (d_model,) float32 each.
    """

    model: LanguageModel
    config: Config
    concept: Concept
    run_id: str
    base: Float[Tensor, " d_model"]
    avoided: Sequence[Float[Tensor, " d_model"]] = ()
    _made: dict[Callable, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def radius(self) -> float:
        """R = ‖θ₀‖ (residual-stream units)."""
        return float(self.base.norm())

    @cached_property
    def taken(self) -> Float64[Tensor, "k d_model"]:
        """Orthonormal rows that span θ₀ and `avoided`; the first is θ₀'s."""
        return torch.linalg.qr(torch.stack([self.base, *self.avoided]).double().T).Q.T.contiguous()

    def beside(self, rows: Float64[Tensor, "*n d_model"]) -> Float64[Tensor, "*n d_model"]:
        """The part of each row that a vector of the chain can have: orthogonal to θ₀ and to `avoided`."""
        for _ in range(2):
            rows = rows - (rows @ self.taken.T) @ self.taken
        return rows

    @cached_property
    def prompt(self) -> Prompts:
        """The training prompt, for next-token logits."""
        return Prompts(self.model, [self.tokens(TRAINING)], self.config.source_layer)

    @cached_property
    def scored(self) -> Prompts:
        """The training prompt with the concept's continuations forced after it."""
        return Prompts(self.model, [self.tokens(TRAINING)], self.config.source_layer, [self.continuations])

    @cached_property
    def continuations(self) -> list[Int[Tensor, " _seq"]]:
        """The tokens of the concept's continuations."""
        return [encode(self.model, text) for text in self.concept.continuations]

    @cached_property
    def base_log_probs(self) -> Float[Tensor, " vocab"]:
        """Log-probabilities of the next token after the training prompt under θ₀, float64."""
        return next(self.prompt.logits(self.base[None]))[0].double().log_softmax(-1)

    @cached_property
    def unsteered_log_probs(self) -> Float[Tensor, " vocab"]:
        """Log-probabilities of the next token after the training prompt, unsteered, float64."""
        return next(self.prompt.logits(torch.zeros_like(self.base)[None]))[0].double().log_softmax(-1)

    @property
    def rounded(self) -> "Study":
        """The same study with the products of the option `eval_products`, for the evaluations that it names."""
        return self if self.model.products == self.config.eval_products else self.once(_rounded)

    def tokens(self, prompt_id: str) -> Int[Tensor, " seq"]:
        """The tokens of the training prompt (`training`) or of a held-out prompt, by name."""
        prompt = self.concept.prompt if prompt_id == TRAINING else self.concept.held_out[prompt_id]
        return self.model.tokenize(prompt, self.config.system_prompt)

    def once(self, make: Callable[["Study"], T]) -> T:
        """Return make(self), computed at the first call and cached; `make` must depend on the study alone."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def rest(self) -> None:
        """Drop the slices that `once` made: the packed weights of their recordings are as large as the layers."""
        for make in [make for make, made in self._made.items() if isinstance(made, Slice)]:
            del self._made[make]

    def row(self, kind: str, index: int, **columns: Any) -> dict[str, Any]:
        """One row of a table: its keys and `columns`."""
        return {"run_id": self.run_id, "kind": kind, "index": index, **columns}


def _rounded(study: Study) -> Study:
    return replace(study, model=study.model.multiplied(study.config.eval_products))


@dataclass(frozen=True)
class Vectors:
    """Vectors of one kind.

    Attributes:
        kind: `base`, `chain`, `unsteered`, `random`, `contrast` or `shuffled`.
        index: index of each vector within its kind.
        theta: the vectors, (len(index), d_model) float32.
    """

    kind: str
    index: Sequence[int]
    theta: Float[Tensor, "n d_model"]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, positions: Sequence[int]) -> "Vectors":
        """The vectors at `positions`, counted from 0."""
        return Vectors(self.kind, [self.index[i] for i in positions], self.theta[list(positions)])

    @property
    def norms(self) -> list[float]:
        """‖θ‖ of each vector."""
        return self.theta.norm(dim=-1).tolist()

    def at(self, index: Sequence[int]) -> "Vectors":
        """The vectors with these indices, without those that are not among them."""
        places = {own: place for place, own in enumerate(self.index)}
        return self.take([places[i] for i in index if i in places])


@dataclass(frozen=True, eq=False)
class Chain:
    """A whole chain, for evaluations of scope `whole`; its properties are computed on first access and cached.

    Attributes:
        base: θ₀, (d_model,) float32.
        every: all vectors, also those that are not finite; the other properties are of the finite ones.
        stored: reads what the run holds of a table, sorted by index; by default it holds nothing.
        avoided: as of `Study`.
    """

    base: Float[Tensor, " d_model"]
    every: Vectors
    stored: Callable[[str], pa.Table] = lambda table: schema.table(table, [])
    avoided: Sequence[Float[Tensor, " d_model"]] = ()
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return make(), computed at the first call with this name and cached."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def length(self) -> int:
        """Index of the last vector."""
        return max(self.every.index, default=0)

    @cached_property
    def vectors(self) -> Vectors:
        """The finite vectors."""
        return self.every.take(torch.isfinite(self.every.theta).all(-1).nonzero()[:, 0].tolist())

    @cached_property
    def median_norm(self) -> float:
        """Median of ‖θ‖."""
        return statistics.median(self.vectors.norms)

    @cached_property
    def basis(self) -> Float[Tensor, "n d_model"]:
        """Orthonormal rows, float64; the first 1 + len(avoided) + i span θ₀, `avoided` and the first i vectors."""
        rows = torch.stack([self.base, *self.avoided, *self.vectors.theta])
        return torch.linalg.qr(rows.double().T).Q.T.contiguous()

    @cached_property
    def broken(self) -> set[int]:
        """Indices of the vectors that are not finite."""
        return {*self.every.index} - {*self.vectors.index}
