"""The layout of prompts and their forced continuations in the rows of a batch, with the attention among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class RowLayout:
    """Prompts and continuations in rows, padded on the right.

    The *offset* of a token counts the tokens of its prompt and then those of the continuations, end to end; it does not
    depend on whether the continuations share a row.

    Attributes:
        tokens: token ids, (rows, width) int64.
        positions: position of each token in its text.
        groups: 0 for the prompt, 1, 2, … for its continuations in the row, −1 for padding.
        offsets: offset of each token.
        of: the rows of each prompt.
        kept: for each row, the columns whose logits predict continuations, or the next token if there is none.
        lengths: tokens in each row.
    """

    tokens: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    groups: Int[Tensor, "rows width"]
    offsets: Int[Tensor, "rows width"]
    of: list[list[int]]
    kept: list[Int[Tensor, " _kept"]]
    lengths: Int[Tensor, " rows"]

    @property
    def common(self) -> int:
        """Length of the prefix common to all rows, up to the first kept position."""
        most = min(int(kept.min()) for kept in self.kept)
        same = (self.tokens[:, :most] == self.tokens[:1, :most]).all(0)
        return int(same.long().cumprod(0).sum())

    def sees(self, rows: Int[Tensor, " n"], start: int, width: int) -> Bool[Tensor, "n query key"]:
        """Attention among the first `width` columns, for queries from `start` on: to the prompt and the own branch."""
        groups = self.groups[rows, :width]
        same = (groups[:, start:, None] == groups[:, None]) | (groups[:, None] == 0)
        return same & torch.ones(width, width).tril().bool()[start:]


def lay_out_rows(
    prompts: Sequence[Int[Tensor, " _seq"]], branches: Sequence[Sequence[Int[Tensor, " _seq"]]], shared: bool
) -> RowLayout:
    """Lay out prompts and their continuations: one row per prompt (`shared`), or one row per continuation."""
    rows: list[tuple[Tensor, ...]] = []
    of: list[list[int]] = []
    for prompt, forced in zip(prompts, branches, strict=True):
        first, offset = len(rows), len(prompt)
        for group in [list(forced)] if shared or not forced else [[branch] for branch in forced]:
            rows.append(_row(prompt, group, offset))
            offset += sum(len(branch) - 1 for branch in group)
        of.append(list(range(first, len(rows))))
    tokens, positions, groups, offsets = (
        nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
        for i, value in enumerate((0, 0, -1, 0))
    )
    lengths = torch.tensor([len(row[0]) for row in rows])
    return RowLayout(tokens, positions, groups, offsets, of, [row[4] for row in rows], lengths)


def _row(prompt: Tensor, branches: Sequence[Tensor], offset: int) -> tuple[Tensor, ...]:
    """Tokens, positions, groups, offsets and kept columns of a row; the offsets of its branches begin at `offset`."""
    # The logits after the last token of a branch are not needed.
    tokens = torch.cat([prompt, *(branch[:-1] for branch in branches)])
    size, last = len(prompt), torch.tensor([len(prompt) - 1])
    positions, groups, kept, start = [torch.arange(size)], [torch.zeros(size).long()], [], size
    for number, branch in enumerate(branches, 1):
        own = torch.arange(len(branch) - 1)
        positions.append(size + own)
        groups.append(torch.full_like(own, number))
        kept.append(torch.cat([last, start + own]))
        start += len(own)
    offsets = torch.cat([torch.arange(size), offset + torch.arange(len(tokens) - size)])
    return tokens, torch.cat(positions), torch.cat(groups), offsets, torch.cat(kept or [last])


class Prefix(Cache):
    """Keys and values of the prefix common to all rows: one row writes them, and every row extends them.

    Attributes:
        size: length of the prefix, tokens.
        written: whether the prefix has been computed.
    """

    def __init__(self, size: int) -> None:
        super().__init__(layers=[])
        self.size, self.written = size, False
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple:
        """Keys and values that a layer's rows attend to, (rows, heads, tokens, head_dim)."""
        own = key_states, value_states
        if not self.written:
            self._kept[layer_idx] = own
            return own
        before = (part.expand(len(key_states), -1, -1, -1) for part in self._kept[layer_idx])
        return tuple(torch.cat(parts, 2) for parts in zip(before, own, strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, because every call passes its positions and masks."""
        return 0
