"""Faster ways to run what a slice runs: weights packed for the CPU, and steps recorded.

Both are chosen by themselves, and where one cannot be had a warning says so and the plain way is taken.
"""

import contextlib
import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from melbo_ray.config import first_line

_WARM_UP = 3
# A recording takes a few seconds on the CPU and saves some milliseconds a call.
_OFTEN = 200


class PackedLinear(nn.Module):
    """The map of a frozen `nn.Linear`, its weight laid out by oneDNN for products with few rows.

    Twice as fast as the plain product at the 20 to 40 tokens of a prompt (float32, AVX-512). Two copies of the weight
    are held, one for the gradient with respect to the input; there is none with respect to the weight.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.transposed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The product x Wᵀ + b."""
        return _PackedProduct.apply(x, self.weight, self.bias, self.transposed)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(gradients[0], ctx.transposed, None), None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def pack(layer: nn.Module, rows: int) -> nn.Module:
    """The layer with every `nn.Linear` a `PackedLinear`, its other parameters shared; the layer itself off the CPU.

    Args:
        layer: a frozen decoder layer; it is not changed.
        rows: rows (tokens) that a product will mostly have.
    """
    linears = [module for module in layer.modules() if type(module) is nn.Linear]
    if not linears or any(linear.weight.device.type != "cpu" for linear in linears):
        return layer
    try:
        replaced = {id(linear): PackedLinear(linear, rows) for linear in linears}
        # A product that this processor cannot compute fails here, not in the middle of a chain.
        replaced[id(linears[0])](linears[0].weight.new_zeros(1, linears[0].in_features))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        warnings.warn(f"weights are not packed, which costs time only: {first_line(error)}", stacklevel=2)
        return layer
    # deepcopy takes whatever its memo holds as copied already: nothing but the linear maps is held twice.
    kept = {id(value): value for value in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, kept | replaced)


class Recorded:
    """A function of tensors, recorded for each choice of shapes and options and then played back.

    On CUDA as a CUDA graph, at the first call: one launch instead of several hundred. On the CPU, at call `after`, as
    the list of its operations: the same ones on the same numbers, so the same bits, without modules and autograd.
    The function must not look at values, nor wait for the device. Where recording fails it is simply called.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], after: int = _OFTEN) -> None:
        self.function, self.after = function, after
        self._calls: Counter = Counter()
        self._recordings: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """function(*inputs, **options); `inputs` on one device, `options` hashable."""
        key = (*(value.shape for value in inputs), *sorted(options.items()))
        self._calls[key] += 1
        cuda = inputs[0].is_cuda
        if key not in self._recordings and (cuda or self._calls[key] >= self.after):
            plain = functools.partial(self.function, **options)
            try:
                self._recordings[key] = _cuda_graph(plain, inputs) if cuda else make_fx(plain)(*inputs)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                warnings.warn(f"steps are not recorded, which costs time only: {first_line(error)}", stacklevel=2)
                self._recordings[key] = plain
        return self._recordings[key](*inputs) if key in self._recordings else self.function(*inputs, **options)


@contextlib.contextmanager
def _no_waiting() -> Generator[None]:
    """While it lasts, whatever waits for the GPU raises RuntimeError: it cannot be recorded, and trying would hurt."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _cuda_graph(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable:
    places = tuple(value.detach().clone() for value in inputs)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    # A recording that fails leaves its stream behind as the current one; this block does not.
    with torch.cuda.stream(side):
        # What is done once only, such as choosing kernels, must be over before the recording (PyTorch's manual).
        for _ in range(_WARM_UP):
            function(*places)
        with _no_waiting():
            function(*places)
        with torch.cuda.graph(graph, stream=side):
            outputs = function(*places)
    torch.cuda.current_stream().wait_stream(side)

    def play(*values: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return play
