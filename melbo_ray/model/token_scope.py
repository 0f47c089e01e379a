"""Which tokens of a forward pass belong to the prompt, which were generated, and which lie at given positions."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from melbo_ray.errors import UserError

Scope = Literal["all", "prompt", "generated"] | Sequence[int]
"""Tokens by name, or positions: from a row's first token that is no padding, or, negative, from its prompt's end."""


@dataclass
class _Prompt:
    """What `generate` was given: number of columns, number of rows, two-dimensional mask if any."""

    width: int
    rows: int
    mask: Tensor | None = None


def check_scope(tokens: Any) -> Scope:
    """The scope, its positions as a tuple.

    Raises:
        UserError: another word, or no positions.
    """
    if isinstance(tokens, str) and tokens in ("all", "prompt", "generated"):
        return tokens
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(type(at) is int for at in tokens):
        raise UserError(f"`tokens` is {tokens!r}: expected all, prompt, generated, or a list of positions")
    if not tokens:
        raise UserError("`tokens` is empty: expected positions, from 0, or negative from the prompt's end")
    return tuple(tokens)


class Reading:
    """Follows a model's passes and its `generate`, and tells which tokens of a pass are in a scope.

    Columns count a row's tokens from the first, padding and cached ones included.

    Args:
        scope: as `check_scope` returns it.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._generate: _Prompt | None = None
        self._read = 0
        self._mask: Tensor | None = None
        self._width: int | None = None
        self._begun = False

    @contextlib.contextmanager
    def generating(self, args: tuple, kwargs: Mapping[str, Any]) -> Generator[None]:
        """Within the context, these arguments of `generate` hold the prompt."""
        names = ("inputs", "input_ids", "inputs_embeds")
        given = [*args[:1], *(kwargs[name] for name in names if kwargs.get(name) is not None)]
        before = self._generate
        if given and isinstance(given[0], Tensor):
            rows, width, *_ = given[0].shape
            self._generate = _Prompt(width, rows, kwargs.get("attention_mask"))
        try:
            yield
        finally:
            self._generate = before

    def begin(self, _owner: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a pass, as a hook of the module that holds the layers: note what the model has read already."""
        if self._scope == "all":
            return
        caches = [value for value in kwargs.values() if hasattr(value, "get_seq_length")]
        held = [name for name in ("past_key_values", "cache_params") if kwargs.get(name) is not None]
        if held and not caches:
            raise UserError(f"this model's cache does not say how much it holds: steer `tokens` all, not {self._scope}")
        self._read = int(caches[0].get_seq_length()) if caches else 0
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask
        elif self._generate is not None or mask is None:
            self._mask = None if self._generate is None else self._generate.mask
        else:
            raise UserError("`tokens` other than all need a two-dimensional attention mask, (batch, seq)")
        self._begun = True

    def where(self, h: Float[Tensor, "batch seq d_model"]) -> Bool[Tensor, "batch seq"] | None:
        """The tokens of this pass that are in the scope; None for all of them.

        Raises:
            UserError: the layers were called without the module that holds them.
        """
        if self._scope == "all":
            return None
        if not self._begun:
            raise UserError("the model's layers run by themselves: steer `tokens` all, the others cannot be told")
        rows, seq, _ = h.shape
        total = self._read + seq
        if self._read == 0 or self._width is None:
            # A context that is entered between two passes finds a prompt that was read before.
            self._width = self._read or total
        width = self._generate.width if self._generate else self._width
        real = self._real(rows, max(total, width)).to(h.device)
        columns = torch.arange(self._read, total, device=h.device)
        return self._chosen(real, columns, width) & real[:, columns]

    def _chosen(self, real: Bool[Tensor, "batch total"], columns: Tensor, width: int) -> Bool[Tensor, "batch seq"]:
        if self._scope in ("prompt", "generated"):
            of_prompt = (columns < width).expand(len(real), -1)
            return of_prompt if self._scope == "prompt" else ~of_prompt
        positions = (real.long().cumsum(1) - 1)[:, columns]
        wanted = torch.tensor(self._scope, device=real.device)
        wanted = torch.where(wanted < 0, wanted + real[:, :width].sum(1, keepdim=True), wanted)
        return (positions[..., None] == wanted[:, None]).any(-1)

    def _real(self, rows: int, total: int) -> Bool[Tensor, "batch total"]:
        """Whether each column so far holds a token rather than padding."""
        real = torch.ones(rows, total, dtype=torch.bool)
        if self._mask is not None:
            mask = self.spread(self._mask, rows)
            real[:, : mask.shape[1]] = mask[:, :total].bool().cpu()
        return real

    def spread(self, values: Shaped[Tensor, "given ..."], rows: int) -> Shaped[Tensor, "rows ..."]:
        """A value for each row of the batch, from one for each row that the caller gave; beams share theirs.

        Raises:
            UserError: the batch has another number of rows.
        """
        copies = rows // len(values) if self._generate and rows % len(values) == 0 else 1
        if copies * len(values) != rows:
            raise UserError(f"{len(values)} vectors for {rows} rows of the batch: expected one for each, or None")
        return values.repeat_interleave(copies, dim=0)
