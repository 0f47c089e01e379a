"""How prompts and the continuations forced after them lie in rows of a batch, and which positions one may look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class Rows:
    """Prompts and continuations in rows, padded on the right.

    Laid out either way, a prompt has *places*: its own tokens, then those of its continuations, end to end.

    Attributes:
        tokens: (rows, width) int64.
        positions: of each token in the text that the model reads.
        groups: 0 the prompt, 1, 2, … its continuations that share the row, −1 padding.
        places: of each token among its prompt's.
        of: the rows of each prompt.
        kept: for each row the positions whose logits predict continuations (or, where there is none, the next token).
        lengths: (rows,) tokens of each row.
    """

    tokens: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    groups: Int[Tensor, "rows width"]
    places: Int[Tensor, "rows width"]
    of: list[list[int]]
    kept: list[Int[Tensor, " _kept"]]
    lengths: Int[Tensor, " rows"]

    @property
    def common(self) -> int:
        """How many tokens all rows begin with, none of them at a position that is kept."""
        most = min(int(kept.min()) for kept in self.kept)
        same = (self.tokens[:, :most] == self.tokens[:1, :most]).all(0)
        return int(same.long().cumprod(0).sum())

    def sees(self, rows: Int[Tensor, " n"], start: int, width: int) -> Bool[Tensor, "n query key"]:
        """Which of the first `width` positions those from `start` on look at: the prompt's and their own branch's."""
        groups = self.groups[rows, :width]
        same = (groups[:, start:, None] == groups[:, None]) | (groups[:, None] == 0)
        return same & torch.ones(width, width).tril().bool()[start:]


def lay_out(
    prompts: Sequence[Int[Tensor, " _seq"]], branches: Sequence[Sequence[Int[Tensor, " _seq"]]], shared: bool
) -> Rows:
    """Rows of prompts and their continuations: one a prompt (`shared`), or one a continuation."""
    rows: list[tuple[Tensor, ...]] = []
    of: list[list[int]] = []
    for prompt, forced in zip(prompts, branches, strict=True):
        first, place = len(rows), len(prompt)
        for group in [list(forced)] if shared or not forced else [[branch] for branch in forced]:
            rows.append(_row(prompt, group, place))
            place += sum(len(branch) - 1 for branch in group)
        of.append(list(range(first, len(rows))))
    tokens, positions, groups, places = (
        nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
        for i, value in enumerate((0, 0, -1, 0))
    )
    lengths = torch.tensor([len(row[0]) for row in rows])
    return Rows(tokens, positions, groups, places, of, [row[4] for row in rows], lengths)


def _row(prompt: Tensor, branches: Sequence[Tensor], place: int) -> tuple[Tensor, ...]:
    """Tokens, positions, groups and places of a row, and its kept positions; its branches' places begin at `place`."""
    # The last token of a branch predicts nothing that is asked for.
    tokens = torch.cat([prompt, *(branch[:-1] for branch in branches)])
    size, last = len(prompt), torch.tensor([len(prompt) - 1])
    positions, groups, kept, start = [torch.arange(size)], [torch.zeros(size).long()], [], size
    for number, branch in enumerate(branches, 1):
        own = torch.arange(len(branch) - 1)
        positions.append(size + own)
        groups.append(torch.full_like(own, number))
        kept.append(torch.cat([last, start + own]))
        start += len(own)
    places = torch.cat([torch.arange(size), place + torch.arange(len(tokens) - size)])
    return tokens, torch.cat(positions), torch.cat(groups), places, torch.cat(kept or [last])


class Prefix(Cache):
    """Keys and values of the tokens that all rows begin with: one row writes them, then every row's own follow them.

    Attributes:
        size: how many tokens they are.
        written: whether they are there.
    """

    def __init__(self, size: int) -> None:
        super().__init__(layers=[])
        self.size, self.written = size, False
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple:
        """Keys and values that a layer's rows look at, (rows, heads, tokens, head_dim)."""
        own = key_states, value_states
        if not self.written:
            self._kept[layer_idx] = own
            return own
        before = (part.expand(len(key_states), -1, -1, -1) for part in self._kept[layer_idx])
        return tuple(torch.cat(parts, 2) for parts in zip(before, own, strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: positions and masks are given with every call."""
        return 0
