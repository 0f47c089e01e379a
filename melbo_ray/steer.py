"""Logits and generation with a steering vector of its own on every row of the batch.

θ is added to the output of decoder block `source` at every position, prompt and generated alike.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melbo_ray.config import UserError
from melbo_ray.model import LanguageModel

PASS_TOKENS = 2048
"""Tokens of one forward pass: enough to fill two cores or one GPU, few enough for the memory of either."""


@contextlib.contextmanager
def steering(
    model: LanguageModel,
    source: int,
    theta: Float[Tensor, "batch d_model"],
    ablated: Float[Tensor, "batch d_model"] | None = None,
) -> Generator[None]:
    """While it lasts, theta[i] is added to the output of block `source` at every position of the batch's row i.

    What the sum then has along ablated[i] (of norm 1, or 0 for nothing) is taken out.
    """

    def add(_layer: nn.Module, _args: tuple, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        steered = h.float() + theta[:, None].to(h.device)
        if ablated is not None:
            units = ablated[:, None].to(h.device)
            steered = steered - (steered * units).sum(-1, keepdim=True) * units
        h = steered.to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = model.layers[source].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class Prompts:
    """Prompts that stay, vectors that change: logits after each prompt, and along continuations forced on the model.

    Everything up to the source layer is computed once. The continuations of one prompt branch from its end inside one
    row, each blind to the others, so that several cost one pass over the prompt.

    Args:
        model: the model.
        prompts: token ids, (seq,) int64 each.
        source: layer after which θ is added.
        continuations: for each prompt the token ids of continuations to force; none by default.

    Attributes:
        targets: for each prompt, the token that each row of its logits predicts: its continuations end to end (empty
            where there is none, and the one row of logits is then the next token's).
        h_source: (prompts, seq, d_model), the source layer's residual stream, unsteered, padded on the right.

    Raises:
        ValueError: several continuations on a row longer than the model's attention window.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Int[Tensor, " seq"]],
        source: int,
        continuations: Sequence[Sequence[Int[Tensor, " seq"]]] | None = None,
    ) -> None:
        self.model, self.source = model, source
        branches = [[branch.cpu() for branch in forced] for forced in continuations or [[]] * len(prompts)]
        rows = [_row(prompt.cpu(), forced) for prompt, forced in zip(prompts, branches, strict=True)]
        self.targets = [torch.cat([torch.empty(0).long(), *forced]) for forced in branches]
        self._kept = [row[3] for row in rows]
        self._lengths = torch.tensor([len(row[0]) for row in rows])
        self._tokens, self._positions, groups = (
            nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
            for i, value in ((0, 0), (1, 0), (2, -1))
        )
        self._mask = _branch_mask(groups) if any(len(forced) > 1 for forced in branches) else None
        window = getattr(model.network.config.get_text_config(), "sliding_window", None) or 1 << 30
        if self._mask is not None and self._tokens.shape[1] > window:
            raise ValueError(f"{self._tokens.shape[1]} tokens with several continuations, and a window of {window}")
        size = max(1, PASS_TOKENS // self._tokens.shape[1])
        parts = [self._below(rows) for rows in torch.arange(len(rows)).split(size)]
        self.h_source: Float[Tensor, "prompts seq d_model"] = torch.cat(parts)

    @torch.no_grad()
    def logits(
        self, theta: Float[Tensor, "n *seq d_model"], rows: Int[Tensor, " n"] | None = None
    ) -> Iterator[Float[Tensor, "kept vocab"]]:
        """Logits of prompt rows[i] under theta[i], in order, float32: a row for each of the prompt's `targets`.

        Without `rows`: one prompt serves every θ; several prompts take one θ each. A θ of shape (seq, d_model) differs
        by position.
        """
        if rows is None:
            rows = torch.arange(len(theta)) if len(self._tokens) > 1 else torch.zeros(len(theta), dtype=torch.long)
        size = max(1, PASS_TOKENS // self._tokens.shape[1])
        for part in (torch.arange(i, min(i + size, len(theta))) for i in range(0, len(theta), size)):
            yield from self._chunk(theta[part.to(theta.device)], rows.cpu()[part])

    def _chunk(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        width = int(self._lengths[rows].max())
        h = self.h_source[rows.to(self.h_source.device), :width]
        theta = (theta[:, None] if theta.ndim == 2 else theta[:, :width]).to(h.device)
        kept = [self._kept[row] for row in rows.tolist()]
        lengths = [len(positions) for positions in kept]
        where = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)), torch.cat(kept)
        with self._instead_of_prefix((h.float() + theta).to(h.dtype)), reading(self.model, where):
            logits = self._forward(rows, width)
        return logits[0].float().split(lengths)

    def _below(self, rows: Tensor) -> Tensor:
        """The source layer's output on these prompts; nothing above it runs."""
        found: list[Any] = []

        def stop(_layer: nn.Module, _args: tuple, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = self.model.layers[self.source].register_forward_hook(stop)
        try:
            with torch.no_grad():
                self._forward(rows, self._tokens.shape[1])
        except _Reached:
            pass
        finally:
            handle.remove()
        self._in_tuple = isinstance(found[0], tuple)
        return found[0][0] if self._in_tuple else found[0]

    def _forward(self, rows: Tensor, width: int) -> Tensor:
        device, arguments = self.model.device, {}
        if self._mask is not None:
            blocked = ~self._mask[rows, None, :width, :width].to(device)
            mask = torch.zeros(blocked.shape, dtype=self.model.dtype, device=device)
            arguments["attention_mask"] = mask.masked_fill_(blocked, torch.finfo(mask.dtype).min)
        tokens, positions = (part[rows, :width].to(device) for part in (self._tokens, self._positions))
        return self.model.network(input_ids=tokens, position_ids=positions, use_cache=False, **arguments).logits

    @contextlib.contextmanager
    def _instead_of_prefix(self, h: Tensor) -> Generator[None]:
        """While it lasts, the blocks up to the source layer cost nothing and put out `h`."""

        def put_out(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (h,) if self._in_tuple else h

        with contextlib.ExitStack() as stack:
            for layer in self.model.layers[: self.source + 1]:
                stack.enter_context(_replaced_forward(layer, put_out))
            yield


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by the source layer's hook: what lies above is not wanted."""


def _row(prompt: Tensor, branches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, position ids, branch numbers (0 the prompt), and the places whose logits predict the branches."""
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
    return tokens, torch.cat(positions), torch.cat(groups), torch.cat(kept or [last])


def _branch_mask(groups: Int[Tensor, "prompts seq"]) -> Tensor:
    """True where position i may look at j: not ahead, in the prompt or in its own branch."""
    same = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == 0)
    return same & torch.ones(groups.shape[1], groups.shape[1]).tril().bool()


@contextlib.contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable) -> Generator[None]:
    # An instance attribute shadows the class's method; libraries that dispatch a model put theirs there too.
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextlib.contextmanager
def reading(model: LanguageModel, where: tuple[Tensor, Tensor]) -> Generator[None]:
    """While it lasts, the model's head sees only the (row, position) pairs of `where`, in a batch of one row."""

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[where[0].to(hidden.device), where[1].to(hidden.device)][None],)

    handle = model.network.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def target_log_probs(logits: Float[Tensor, "kept vocab"], targets: Int[Tensor, " kept"]) -> Float[Tensor, " kept"]:
    """The log-probability of each target token (nats), float32."""
    return logits.log_softmax(-1).gather(-1, targets.to(logits.device)[:, None])[:, 0]


def encode(model: LanguageModel, continuation: str) -> Int[Tensor, " seq"]:
    """The tokens of a text that continues another; UserError where it has none."""
    ids = model.tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
    if not len(ids):
        raise UserError("a continuation is empty: give the opening of an answer")
    return ids


def continuation_score(
    model: LanguageModel,
    prompt_tokens: Int[Tensor, " seq"],
    continuations: Sequence[str],
    source_layer: int,
    thetas: Float[Tensor, "n d_model"],
) -> Float[Tensor, " n"]:
    """Mean log-probability per token of all `continuations` after the prompt, steered minus unsteered.

    Nats per token, float32, on the CPU; every token of every continuation counts the same. Above 0 the vector makes
    the concept likelier. NaN for a vector that is not finite.
    """
    prompts = Prompts(model, [prompt_tokens], source_layer, [[encode(model, text) for text in continuations]])
    rows = torch.cat([thetas.new_zeros(1, model.d_model), thetas])
    scores = [target_log_probs(logits, prompts.targets[0]).mean().cpu() for logits in prompts.logits(rows)]
    return torch.stack(scores)[1:] - scores[0]
