"""The steered slice of a model: from the source layer's residual stream plus θ to the target layer's.

Layer ℓ is the output of decoder block ℓ counted from 0: the post's and TransformerLens's `blocks.ℓ.hook_resid_post`,
transformers' `hidden_states[ℓ + 1]`. θ is added after block `source`; blocks source + 1 … target run on the sum.
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
from melbo_ray.model.architecture import chosen, stream, taken, together
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.soundness import require_steerable, sound

# Evaluations from which on compiling the step saves more time than it takes (2 cores: half a minute, 6 ms of 25).
_WORTH_COMPILING = 10_000


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside the one real forward pass when every call has been seen."""


class Slice:
    """h_target(θ) on one or more prompts; everything below the source layer has been computed once.

    The blocks are called exactly as the model itself called them in one real forward pass (arguments captured by
    hooks and replayed), so any decoder-only architecture of transformers works. Prompts of different lengths are
    padded on the right: attention is causal, so what stands to the right of a position cannot reach it. Layers whose
    arguments fit a batch of one alone (ALiBi's of Bloom) take one row at a time, and a warning says so.

    Args:
        model: the model; its parameters are frozen.
        prompts: token ids, (seq,) int64 each, one row of the slice each.
        source: layer after which θ is added.
        target: layer whose output is read; source < target < number of layers.
        evaluations: of `value_and_grad`, about how many are to come: from 10,000 on it is compiled.

    Raises:
        UserError: a layer out of range, source not below target, or what `require_steerable` raises.
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
        self._at_once = self._sound()
        # A recording on CUDA is of one device.
        on_one = {parameter.device for layer, _ in self._calls for parameter in layer.parameters()} <= {model.device}
        # Held weakly: in a cycle with it, a recording's memory would stay on the GPU until some later collection.
        step = functools.partial(Slice._value_and_grad, weakref.proxy(self))
        self.value_and_grad = Recorded(step, evaluations >= _WORTH_COMPILING, model.packed) if on_one else step

    @property
    def num_prompts(self) -> int:
        """Prompts of the slice."""
        return len(self.lengths)

    def h_target(
        self, theta: Float[Tensor, "batch d_model"], rows: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """The target layer's residual stream, in the model's dtype, with theta[i] added on prompt rows[i].

        Without `rows`: one prompt serves every θ; several prompts take one θ each, in order.
        """
        if not self._at_once and len(theta) > 1:
            rows = self._of(torch.arange(self.num_prompts), theta, rows)
            return torch.cat([self._through(theta[i : i + 1], rows[i : i + 1]) for i in range(len(theta))])
        return self._through(theta, rows)

    def _through(self, theta: Tensor, rows: Tensor | None) -> Tensor:
        """`h_target` in one pass."""
        h = (self._of(self.h_source, theta, rows) + theta[:, None, :]).to(self.model.dtype)
        # What layers write for later ones is of one pass.
        made: dict[int, Any] = {}
        for layer, arguments in self._calls:
            h = call(layer, h, chosen(arguments, lambda values: self._of(values, theta, rows), made))
        return h.to(theta.device)

    def z(
        self, theta: Float[Tensor, "batch d_model"], rows: Int[Tensor, " batch"] | None = None, z_from: int = 0
    ) -> Float[Tensor, "batch d_model"]:
        """The mean of `h_target` over the prompt's positions from `z_from` on, float32; from 0 it is the post's z."""
        return self.mean(self.h_target(theta, rows), rows, z_from)

    def mean(
        self, h: Float[Tensor, "batch seq d_model"], rows: Int[Tensor, " batch"] | None = None, z_from: int = 0
    ) -> Float[Tensor, "batch d_model"]:
        """The mean of h[i] over the positions of prompt rows[i] from `z_from` on, float32; NaN where there is none."""
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
        """‖z(θ) − z_base‖ + norm_penalty·‖θ‖ of each row and its gradient; a longer θ is first shortened to `max_norm`.

        Everything on the slice's device and float32; nothing waits for the device.
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
        """Whether rows of a batch come out as each alone."""
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
    """Raises UserError unless 0 <= source < target < num_layers."""
    if not 0 <= source < num_layers or not 0 <= target < num_layers:
        raise UserError(
            f"layers {source} → {target} are out of range: the model has {num_layers}, so 0 to {num_layers - 1}"
        )
    if source >= target:
        raise UserError(f"source layer {source} is not below target layer {target}: choose source < target")


def capture(
    model: LanguageModel, tokens: Int[Tensor, "1 seq"], source: int, target: int
) -> tuple[Float[Tensor, "1 seq d_model"], list[tuple[nn.Module, tuple[tuple, dict[str, Any]]]]]:
    """The source layer's output on `tokens`, and how the model calls each of layers source + 1 … target.

    A call is (layer, (positional arguments after the hidden states, keyword arguments)). Nothing above the target
    layer runs.

    Raises:
        UserError: what a layer takes is not what the one below it puts out: these are no layers to be called in turn.
    """
    calls: list[tuple[nn.Module, tuple[tuple, dict[str, Any]]]] = []
    hidden: list[Tensor] = []
    below: list[Tensor] = []

    def put_out(_layer: nn.Module, _args: tuple, output: Any) -> None:
        # What comes next may write into it.
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
    """The layer's output hidden states, whether it returns them bare or first in a tuple."""
    args, kwargs = arguments
    return stream(layer(h, *args, **kwargs))
