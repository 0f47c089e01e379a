"""Logits under a separate steering vector for every row of the batch.

θ is added to the output of decoder layer `source` at every position of prompt and continuation.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.host import progress
from melbo_ray.model.architecture import masks, stream
from melbo_ray.model.hooks import logits_at, reaching, skipping, steering
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.packed_linear import onednn
from melbo_ray.model.products import multiplying
from melbo_ray.model.rows import Prefix, lay_out_rows
from melbo_ray.model.soundness import require_steerable, sound

PASS_TOKENS = 2048
"""Tokens per forward pass: enough to saturate two cores or one GPU, and few enough for the memory of either."""
# The same for a pass that computes the logits of every position.
_TOKENS_WHOLE = 256


class Prompts:
    """Fixed prompts under varying vectors: logits after each prompt and along forced continuations.

    The layers up to the source are computed once (`rows`). The continuations of one prompt share its row, masked from
    each other, so that they cost one pass over the prompt (`branches`). Both ways are compared with the plain one
    (`whole`: a pass of the whole model over each continuation) at a model's first use, and again on longer rows than
    before; if one differs, a warning says so and the next way is taken.

    Args:
        model: the model.
        prompts: token ids, (seq,) int64 each.
        source: layer to whose output θ is added.
        continuations: for each prompt, the token ids of the continuations to force; none by default.
        way: `branches`, `rows` or `whole`; by default the first of these that is correct on this model.

    Attributes:
        targets: for each prompt, the tokens that the rows of its logits predict: its continuations end to end; empty
            without continuations, when the only row predicts the next token.
        way: the way taken.

    Raises:
        UserError: the model cannot be steered (`require_steerable`).
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Int[Tensor, " _seq"]],
        source: int,
        continuations: Sequence[Sequence[Int[Tensor, " _seq"]]] | None = None,
        way: str = "",
    ) -> None:
        self.model, self.source = model, source
        prompts = [prompt.cpu() for prompt in prompts]
        require_steerable(model, prompts[0])
        branches = [[branch.cpu() for branch in forced] for forced in continuations or [[]] * len(prompts)]
        self.targets = [torch.cat([torch.empty(0).long(), *forced]) for forced in branches]
        self.way = way or _pick(model, prompts, source, branches)
        self._rows = lay_out_rows(prompts, branches, self.way == "branches")
        size = max(1, PASS_TOKENS // self._rows.tokens.shape[1])
        parts = [self._below(rows) for rows in torch.arange(len(self._rows.tokens)).split(size)]
        self._h = torch.cat(parts)

    @functools.cached_property
    def h_source(self) -> Float[Tensor, "prompts offsets d_model"]:
        """The unsteered output of the source layer: each prompt, then its continuations, padded on the right."""
        layout = self._rows
        owner = torch.tensor([prompt for prompt, rows in enumerate(layout.of) for _ in rows])
        there = layout.groups >= 0
        whole = self._h.new_zeros(len(layout.of), int(layout.offsets.max()) + 1, self._h.shape[-1])
        here = whole.device
        whole[owner[:, None].expand_as(there)[there].to(here), layout.offsets[there].to(here)] = self._h[there.to(here)]
        return whole

    @torch.no_grad()
    def logits(
        self, theta: Float[Tensor, "n *offsets d_model"], prompts: Int[Tensor, " n"] | None = None
    ) -> Iterator[Float[Tensor, "kept vocab"]]:
        """Logits of prompts[i] under theta[i], in order, float32: one row per target of the prompt.

        Without `prompts`, a single prompt is used for every θ, and several prompts take one θ each. A θ of shape
        (offsets, d_model) differs by position, in the layout of `h_source`.
        """
        if prompts is None:
            prompts = torch.arange(len(theta)) if len(self.targets) > 1 else torch.zeros(len(theta), dtype=torch.long)
        for part in self._parts(len(theta)):
            yield from self.chunk(theta[part.to(theta.device)], prompts.cpu()[part])

    @torch.no_grad()
    def under(self, theta: Float[Tensor, " d_model"]) -> Iterator[Float[Tensor, "kept vocab"]]:
        """Logits of every prompt under one θ, in order, float32.

        The prefix common to all prompts, such as a system turn, is prefilled once, and the rows continue from its keys
        and values. This is compared with `logits` like the ways of the class, and if it differs, `logits` is used.
        """
        prompts = torch.arange(len(self.targets))
        prefix = self._prefix(theta) if self._sharing() else None
        for part in self._parts(len(prompts), 0 if prefix is None else prefix.size):
            yield from self.chunk(theta.expand(len(part), -1), prompts[part], prefix)

    def _parts(self, count: int, skipped: int = 0) -> Iterable[Tensor]:
        """The indices below `count`, split into one tensor per pass."""
        rows = max(map(len, self._rows.of))
        width = self._rows.tokens.shape[1] - skipped
        most = _TOKENS_WHOLE if self.way == "whole" else PASS_TOKENS
        return torch.arange(count).split(max(1, most // (rows * width))) if count else []

    def chunk(self, theta: Tensor, prompts: Tensor, prefix: Prefix | None = None) -> tuple[Tensor, ...]:
        """`logits` in one pass, of which θ may ask for a gradient."""
        progress.passes += 1
        layout = self._rows
        of = [layout.of[prompt] for prompt in prompts.tolist()]
        rows = torch.tensor([row for group in of for row in group])
        owner = torch.repeat_interleave(torch.tensor([len(group) for group in of])).to(theta.device)
        start, width = 0 if prefix is None else prefix.size, int(layout.lengths[rows].max())
        offsets = layout.offsets[rows, start:width].to(theta.device)
        added = theta[owner][:, None] if theta.ndim == 2 else theta[owner[:, None], offsets]
        kept = [layout.kept[row] - start for row in rows.tolist()]
        where = torch.repeat_interleave(torch.tensor([len(part) for part in kept])), torch.cat(kept)
        logits = self._run(rows, added, where, (start, width), prefix)
        return logits.float().split([sum(len(layout.kept[row]) for row in group) for group in of])

    def _run(
        self, rows: Tensor, added: Tensor, where: tuple[Tensor, Tensor], span: tuple[int, int], prefix: Prefix | None
    ) -> Tensor:
        """Logits at `where`, with `added` on the source layer of the rows; the columns are those of `span`."""
        if self.way == "whole":
            with steering(self.model, self.source, added):
                return self._forward(rows, span)[where]
        with self._skipping(rows, added, span), logits_at(self.model, where):
            return self._forward(rows, span, prefix)[0]

    def _skipping(self, rows: Tensor, added: Tensor, span: tuple[int, int]) -> AbstractContextManager[None]:
        h = self._h[rows.to(self._h.device), slice(*span)]
        h = (h.float() + added.to(h.device)).to(h.dtype)
        return skipping(self.model, self.source, h, self._in_tuple)

    def _below(self, rows: Tensor) -> Tensor:
        """The source layer's output on these rows; the layers above do not run."""
        with torch.no_grad(), reaching(self.model.layers[self.source]) as found:
            self._forward(rows, (0, self._rows.tokens.shape[1]))
        self._in_tuple = isinstance(found[0], tuple)
        return stream(found[0])

    def _forward(self, rows: Tensor, span: tuple[int, int], prefix: Prefix | None = None) -> Tensor:
        start, width = span
        layout, arguments = self._rows, {}
        if self.way == "branches" or prefix is not None:
            positions = layout.positions[rows, :width].to(self.model.device)
            seen = layout.sees(rows, start, width).to(self.model.device)
            arguments = {
                "attention_mask": masks(self.model.network, seen, positions[:, start:], positions),
                "position_ids": positions[:, start:],
                "past_key_values": prefix,
            }
        tokens = layout.tokens[rows, start:width].to(self.model.device)
        with onednn(), multiplying(self.model):
            return self.model.network(input_ids=tokens, use_cache=prefix is not None, **arguments).logits

    def _prefix(self, theta: Float[Tensor, " d_model"]) -> Prefix:
        """The keys and values of the common prefix under θ."""
        prefix = Prefix(self._rows.common)
        row, span = torch.zeros(1, dtype=torch.long), (0, prefix.size)
        with self._skipping(row, theta, span), reaching(self.model.layers[-1]):
            self._forward(row, span, prefix)
        prefix.written = True
        return prefix

    def _sharing(self) -> bool:
        """Whether `under` may prefill the common prefix once."""
        if self.way == "whole" or len(self.targets) < 2 or not self._rows.common:
            return False
        length = int(self._rows.lengths.max())
        ends = torch.tensor([0, len(self.targets) - 1])

        def ours() -> tuple[Tensor, ...]:
            return self.chunk(theta.expand(2, -1), ends, self._prefix(theta))

        theta = _probe(self)
        plain = functools.partial(self.logits, theta.expand(2, -1), ends)
        what = "what all prompts begin with is read anew for each"
        return sound(self.model, f"prefix after layer {self.source}", length, what, ours, plain)


def _pick(model: LanguageModel, prompts: list[Tensor], source: int, branches: list[list[Tensor]]) -> str:
    """The first way that is correct on the longest prompt, among those with several continuations if there are any."""
    most = max(map(len, branches), default=0)
    sizes = [(len(own) > 1, len(prompt) + sum(map(len, own))) for prompt, own in zip(prompts, branches, strict=True)]
    (_, length), longest = max((size, i) for i, size in enumerate(sizes))
    told = {"branches": "continuations of one prompt do not share its row", "rows": "layers below the source run anew"}
    for way in ("branches", "rows") if most > 1 else ("rows",):

        def under_probe(way: str) -> list[Tensor]:
            one = Prompts(model, [prompts[longest]], source, [branches[longest]], way)
            return list(one.logits(_probe(one)[None]))

        ours, plain = functools.partial(under_probe, way), functools.partial(under_probe, "whole")
        if sound(model, f"{way} after layer {source}", length, told[way], ours, plain):
            return way
    return "whole"


def _probe(prompts: Prompts) -> Float[Tensor, " d_model"]:
    """A random vector with a clear effect: its norm is a third of the stream's median norm."""
    # The first prompt alone, whose layout is the same in every way.
    own = prompts._h[0, : int(prompts._rows.kept[0].min()) + 1]
    norm = own.float().norm(dim=-1).median().cpu() / 3
    draw = torch.randn(prompts.model.d_model, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(draw, dim=-1) * norm


def target_log_probs(logits: Float[Tensor, "kept vocab"], targets: Int[Tensor, " kept"]) -> Float[Tensor, " kept"]:
    """The log-probability of each target token, nats, float32."""
    return logits.log_softmax(-1).gather(-1, targets.to(logits.device)[:, None])[:, 0]


def kl(log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """KL(P‖Q) = Σ P (log P − log Q), nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def encode(model: LanguageModel, continuation: str) -> Int[Tensor, " seq"]:
    """The tokens of a continuation, without special tokens.

    Raises:
        UserError: the continuation is empty.
    """
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

    The score is in nats per token, float32, on the CPU; all tokens of all continuations have equal weight. A positive
    score means that the vector makes the concept more likely; a vector that is not finite has NaN.
    """
    prompts = Prompts(model, [prompt_tokens], source_layer, [[encode(model, text) for text in continuations]])
    rows = torch.cat([thetas.new_zeros(1, model.d_model), thetas])
    scores = torch.stack([target_log_probs(logits, prompts.targets[0]).mean() for logits in prompts.logits(rows)]).cpu()
    return scores[1:] - scores[0]
