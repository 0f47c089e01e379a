"""Faster ways to run what a slice runs: weights packed for the CPU, a recorded graph on CUDA.

Both are chosen by themselves, and where one cannot be had a warning says so and the plain way is taken.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from melbo_ray.model import first_line

_WARM_UP = 3


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
    """A function of CUDA tensors, recorded as a CUDA graph at the first call with each choice of shapes and options.

    A step is then one launch instead of several hundred. On the CPU, and where recording fails, the function is simply
    called; it must not wait for the device.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._plain = not torch.cuda.is_available()

    def __call__(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """function(*inputs, **options); `inputs` on one device, `options` hashable."""
        if self._plain or not inputs[0].is_cuda:
            return self.function(*inputs, **options)
        key = (*(value.shape for value in inputs), *sorted(options.items()))
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(inputs, options)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, steps take longer: {first_line(error)}", stacklevel=2)
                self._plain = True
                return self.function(*inputs, **options)
        graph, places, outputs = self._graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def _record(self, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> tuple:
        places = tuple(value.detach().clone() for value in inputs)
        # What is done once only, such as choosing kernels, must be over before the recording (PyTorch's manual).
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.function(*places, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*places, **options)
        return graph, places, outputs
