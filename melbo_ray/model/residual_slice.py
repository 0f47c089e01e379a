"""The steered slice of a model, from the residual stream after the source layer plus θ to that after the target layer.

Layer ℓ denotes the output of decoder layer ℓ, counted from 0: `blocks.ℓ.hook_resid_post` in the post and in
TransformerLens, `hidden_states[ℓ + 1]` in transformers. Layers source + 1 … target run on the sum.
"""

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melbo_ray.errors import UserError
from melbo_ray.host import progress
from melbo_ray.model.architecture import chosen, stream, taken, together
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.soundness import require_steerable, sound

# Number of evaluations from which compiling the step pays off (on 2 cores: half a minute, for 6 ms less of 25).
_WORTH_COMPILING = 10_000
GRADIENT_TOKENS = 1024
"""Maximum number of tokens per forward and backward pass through a slice, which bounds the memory of activations."""


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Raised to end the captured forward pass after the target layer's call."""


class Slice:
    """The target layer's residual stream as a function of θ, on one or more prompts.

    The layers up to the source are computed once. The layers above are called with the arguments that the model passed
    in one real forward pass, captured by hooks, so any decoder-only architecture of transformers works. Prompts are
    padded on the right, which causal attention ignores. Layers whose arguments only fit a batch of one (ALiBi in Bloom)
    process one row at a time, and a warning says so.

    Args:
        model: the model; its parameters are frozen.
        prompts: token ids, (seq,) int64 each, one row of the slice each.
        source: layer to whose output θ is added.
        target: layer whose output is compared; source < target < number of layers.
        evaluations: expected number of `value_and_grad` calls; from 10,000 on the step is compiled.

    Attributes:
        h_source: the unsteered output of the source layer, (prompts, seq, d_model) float32.
        lengths: tokens of each prompt, (prompts,) int64.
        preconditioners: diagonals for L-BFGS, (d_model,) float64, by `z_from` and row (`search.preconditioner`).

    Raises:
        UserError: a layer is out of range, source is not below target, or the model cannot be steered
            (`require_steerable`).
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Int[Tensor, " _seq"]],
        source: int,
        target: int,
        evaluations: int = 0,
    ) -> None:
        check_layers(source, target, len(model.layers))
        require_steerable(model, prompts[0])
        self.model, self.source, self.target = model, source, target
        self.prompts = list(prompts)
        self.lengths = torch.tensor([len(tokens) for tokens in prompts], device=model.device)
        padded = nn.utils.rnn.pad_sequence(self.prompts, batch_first=True).to(model.device)
        captures = [capture(model, row[None], source, target) for row in padded]
        merged: dict[int, Any] = {}
        self._calls = [
            (calls[0][0], together([arguments for _, arguments in calls], merged))
            for calls in zip(*(calls for _, calls in captures), strict=True)
        ]
        h_source = torch.cat([hidden for hidden, _ in captures])
        self.h_source: Float[Tensor, "prompts seq d_model"] = h_source.to(model.device, torch.float32)
        self.preconditioners: dict[int, dict[int, Float[Tensor, " d_model"]]] = {}
        self._at_once = self._sound()
        # A CUDA graph covers one device only.
        on_one = {parameter.device for layer, _ in self._calls for parameter in layer.parameters()} <= {model.device}
        # Held weakly: a reference cycle would keep a recording's GPU memory until garbage collection.
        step = functools.partial(Slice._value_and_grad, weakref.proxy(self))
        self.value_and_grad = Recorded(step, evaluations >= _WORTH_COMPILING, model.packed) if on_one else step

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def rows_at_once(self) -> int:
        """Rows of a pass of at most `GRADIENT_TOKENS` tokens; at least 1."""
        return max(1, GRADIENT_TOKENS // self.h_source.shape[1])

    def h_target(
        self, theta: Float[Tensor, "batch d_model"], rows: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """The target layer's residual stream on prompt rows[i] under theta[i], in the model's dtype.

        Without `rows`, a single prompt is used for every θ, and several prompts take one θ each, in order.
        """
        if not self._at_once and len(theta) > 1:
            rows = self._of(torch.arange(self.num_prompts), theta, rows)
            return torch.cat([self._through(theta[i : i + 1], rows[i : i + 1]) for i in range(len(theta))])
        return self._through(theta, rows)

    def _through(self, theta: Tensor, rows: Tensor | None) -> Tensor:
        """`h_target` in one pass."""
        progress.passes += 1
        h = (self._of(self.h_source, theta, rows) + theta[:, None, :]).to(self.model.dtype)
        # Layers pass keys and values to later layers within one pass.
        made: dict[int, Any] = {}
        for layer, arguments in self._calls:
            h = call(layer, h, chosen(arguments, lambda values: self._of(values, theta, rows), made))
        return h.to(theta.device)

    def z(
        self, theta: Float[Tensor, "batch d_model"], rows: Int[Tensor, " batch"] | None = None, z_from: int = 0
    ) -> Float[Tensor, "batch d_model"]:
        """The mean of `h_target` over the prompt's positions from `z_from` on, float32; the post's z starts at 0."""
        return self.mean(self.h_target(theta, rows), rows, z_from)

    def mean(
        self, h: Float[Tensor, "batch seq d_model"], rows: Int[Tensor, " batch"] | None = None, z_from: int = 0
    ) -> Float[Tensor, "batch d_model"]:
        """The mean of h[i] over the positions of prompt rows[i] from `z_from` on, float32; NaN if there are none."""
        lengths = self._of(self.lengths, h, rows)[:, None]
        positions = torch.arange(h.shape[1], device=h.device)
        counted = ((positions >= z_from) & (positions < lengths)).float()
        return (h.float() * (counted / (lengths - z_from))[..., None]).sum(1)

    def _value_and_grad(
        self,
        theta: Tensor,
        z_base: Tensor,
        rows: Tensor,
        *,
        z_from: int = 0,
        norm_penalty: float = 0.0,
        max_norm: float | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"]]:
        """The loss ‖z(θ) − z_base‖ + norm_penalty·‖θ‖ of each row and its gradient; θ is first shortened to `max_norm`.

        All tensors are float32 on the slice's device, and nothing synchronises with the device.
        """
        free = theta.detach().requires_grad_()
        bounded = free
        if max_norm is not None:
            bounded = free * (max_norm / free.norm(dim=-1, keepdim=True)).clamp(max=1)
        losses = (self.z(bounded, rows, z_from) - z_base).norm(dim=-1)
        if norm_penalty:
            losses = losses + norm_penalty * bounded.norm(dim=-1)
        (gradient,) = torch.autograd.grad(losses.sum(), free)
        return losses.detach(), gradient

    @torch.no_grad()
    def _sound(self) -> bool:
        """Whether the rows of a batch agree with single rows."""
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(2, self.h_source.shape[-1], generator=generator).to(self.h_source)
        theta = nn.functional.normalize(draws, dim=-1) * self.h_source[0, : self.lengths[0]].norm(dim=-1).median() / 3
        rows = torch.tensor([0, self.num_prompts - 1])

        def alone() -> list[Tensor]:
            return [self._through(theta[i : i + 1], rows[i : i + 1])[0] for i in range(2)]

        name, length = f"rows of layers {self.source} to {self.target}", self.h_source.shape[1]
        one = "vectors pass the slice one at a time"
        return sound(self.model, name, length, one, lambda: self._through(theta, rows), alone)

    def _of(self, values: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            return values[rows.to(values.device)]
        if self.num_prompts == 1:
            return values.expand(len(theta), *values.shape[1:])
        if self.num_prompts != len(theta):
            raise ValueError(f"{len(theta)} vectors for {self.num_prompts} prompts: say which with `rows`")
        return values


def check_layers(source: int, target: int, num_layers: int) -> None:
    """Check the layer numbers.

    Raises:
        UserError: unless 0 <= source < target < num_layers.
    """
    if not 0 <= source < num_layers or not 0 <= target < num_layers:
        raise UserError(
            f"layers {source} → {target} are out of range: the model has {num_layers}, so 0 to {num_layers - 1}"
        )
    if source >= target:
        raise UserError(f"source layer {source} is not below target layer {target}: choose source < target")


def capture(
    model: LanguageModel, tokens: Int[Tensor, "1 seq"], source: int, target: int
) -> tuple[Float[Tensor, "1 seq d_model"], list[tuple[nn.Module, tuple[tuple, dict[str, Any]]]]]:
    """The source layer's output on `tokens`, and the model's calls of layers source + 1 … target.

    A call is (layer, (positional arguments after the hidden states, keyword arguments)). The layers above the target
    do not run.

    Raises:
        UserError: a layer's input is not the output of the layer below, so the layers cannot be called in sequence.
    """
    calls: list[tuple[nn.Module, tuple[tuple, dict[str, Any]]]] = []
    hidden: list[Tensor] = []
    below: list[Tensor] = []

    def put_out(_layer: nn.Module, _args: tuple, output: Any) -> None:
        # Cloned, because later code may modify it in place.
        below.append(stream(output).detach().clone())

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h, others = taken(args, kwargs)
        if not (below and bool(((h == below[-1].to(h.device)) | h.isnan()).all())):
            raise UserError(
                f"cannot steer this model: what its layer {source + 1 + len(calls)} takes is not what the one below it "
                "puts out; where `layers` names them, is it another list?"
            )
        hidden.append(h.detach())
        calls.append((layer, others))
        if layer is model.layers[target]:
            raise _Captured

    with contextlib.ExitStack() as hooks:
        for layer in model.layers[source:target]:
            hooks.callback(layer.register_forward_hook(put_out).remove)
        for layer in model.layers[source + 1 : target + 1]:
            hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        with torch.no_grad(), contextlib.suppress(_Captured):
            model.network(input_ids=tokens, use_cache=False)
    return hidden[0], calls


def call(layer: nn.Module, h: Float[Tensor, "batch seq d_model"], arguments: tuple[tuple, dict[str, Any]]) -> Tensor:
    """Call a layer and return its hidden states."""
    args, kwargs = arguments
    return stream(layer(h, *args, **kwargs))
