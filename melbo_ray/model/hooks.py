"""Context managers that change a model's forward pass: steer, skip layers, stop early, compute selected logits only."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from melbo_ray.model.architecture import stream, with_stream
from melbo_ray.model.language_model import LanguageModel


@contextlib.contextmanager
def steering(
    model: LanguageModel,
    source: int,
    theta: Float[Tensor, "batch *seq d_model"],
    ablated: Float[Tensor, "batch d_model"] | None = None,
) -> Generator[None]:
    """Within the context, add theta[i] to the output of layer `source` at every position of row i.

    A θ of shape (seq, d_model) differs by position. If `ablated` is given, the sum's component along ablated[i] is
    projected out; ablated[i] is a unit vector, or 0 for no ablation.
    """
    added = theta[:, None] if theta.ndim == 2 else theta

    def add(_layer: nn.Module, _args: tuple, output: Any) -> Any:
        h = stream(output)
        steered = h.float() + added.to(h.device)
        if ablated is not None:
            units = ablated[:, None].to(h.device)
            steered = steered - (steered * units).sum(-1, keepdim=True) * units
        return with_stream(output, steered.to(h.dtype))

    handle = model.layers[source].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by the hook of `reaching` to end the forward pass."""


@contextlib.contextmanager
def reaching(module: nn.Module) -> Generator[list[Any]]:
    """Within the context, a forward pass ends after `module`, whose output is appended to the yielded list."""
    found: list[Any] = []

    def stop(_module: nn.Module, _args: tuple, output: Any) -> None:
        found.append(output)
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        yield found
    except _Reached:
        pass
    finally:
        handle.remove()


@contextlib.contextmanager
def skipping(
    model: LanguageModel, source: int, h: Float[Tensor, "batch seq d_model"], in_tuple: bool
) -> Generator[None]:
    """Within the context, the layers up to the source layer return `h`, in a tuple or bare, without computing."""

    def put_out(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (h,) if in_tuple else h

    with contextlib.ExitStack() as stack:
        for layer in model.layers[: source + 1]:
            stack.enter_context(_replaced_forward(layer, put_out))
        yield


@contextlib.contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable) -> Generator[None]:
    # An instance attribute shadows the class's method; accelerate's dispatch sets one too, which is restored.
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextlib.contextmanager
def logits_at(model: LanguageModel, where: tuple[Tensor, Tensor]) -> Generator[None]:
    """Within the context, the head computes logits only at the (row, position) pairs `where`, as a batch of one row."""

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[where[0].to(hidden.device), where[1].to(hidden.device)][None],)

    handle = model.network.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
