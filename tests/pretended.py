"""Devices that are pretended: tensors that live on the CPU, say that they are elsewhere, and refuse to meet others.

They stand in for the GPUs of one machine in tests of where tensors are placed: values are right, an operation on
tensors of different devices raises as it would on GPUs, and accelerate's own hooks move what passes between layers.
What is not covered: CUDA itself, its streams and graphs, and its speed.
"""

import contextlib
import copy
from collections.abc import Generator
from typing import Any

import accelerate
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from melbo_ray.model.language_model import LanguageModel

# A device type that this build of torch knows by name, without a backend that would have to be started.
DEVICES = ("lazy:0", "lazy:1")
_CPU = torch.device("cpu")
_MOVING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# Operations whose result depends on values: a number, or the size of a tensor.
_FETCHING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_waits: list[str] = []


@contextlib.contextmanager
def pretending() -> Generator[None]:
    """While it lasts, tensors can be made on DEVICES and moved there."""
    with _Operations(), _Conversions():
        yield


@contextlib.contextmanager
def waiting() -> Generator[list[str]]:
    """Within `pretending`: the operations for which a host would wait: values fetched, tensors moved to or fro."""
    _waits.clear()
    yield _waits


def on_one(model: LanguageModel) -> LanguageModel:
    """A copy of the model whose weights are all on the first device."""
    network = copy.deepcopy(model.network)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(weight.detach().to(DEVICES[0]), False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(DEVICES[0]))
    return LanguageModel.wrap(network, model.tokenizer)


def spread(model: LanguageModel) -> LanguageModel:
    """A copy of the model by accelerate: the upper half of the layers on the second device, the rest on the first."""
    network = copy.deepcopy(model.network)
    names = {id(module): name for name, module in network.named_modules()}
    layers = names[id(LanguageModel.wrap(network, model.tokenizer).layers)]
    device_map = {
        name: DEVICES[0]
        for name, module in network.named_modules()
        if not list(module.children()) and not name.startswith(f"{layers}.")
    }
    for number in range(len(model.layers)):
        device_map[f"{layers}.{number}"] = DEVICES[2 * number // len(model.layers)]
    # As transformers does where it is given a device_map.
    skipped = network._skip_keys_device_placement
    accelerate.dispatch_model(network, device_map, main_device=DEVICES[0], skip_keys=skipped)  # ty: ignore[invalid-argument-type]
    return LanguageModel.wrap(network, model.tokenizer)


class _Placed(torch.Tensor):
    """A tensor with its value on the CPU."""

    @staticmethod
    def __new__(cls, value: torch.Tensor, device: torch.device) -> "_Placed":
        sizes: dict[str, Any] = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, **sizes, dtype=value.dtype, device=device)

    def __init__(self, value: torch.Tensor, _device: torch.device) -> None:
        self.value = value

    def tolist(self) -> Any:
        _waits.append("tolist")
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, _types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Conversions(TorchFunctionMode):
    """Lists become tensors below what `_Operations` sees: they are made on the CPU and moved."""

    def __torch_function__(self, function, _types, args: tuple = (), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function in _PRODUCTS and args[0].ndim == 1:
            # Torch squeezes the product in place, which a pretended tensor does not see.
            return function(args[0][None], *args[1:], **kwargs)[0]
        if function in _PRODUCTS and args[1].ndim == 1:
            return function(args[0], args[1][:, None], **kwargs)[..., 0]
        if function is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(part).long() if isinstance(part, list) else part for part in index)
        return function(*args, **kwargs)


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # A number on the CPU may meet any device, and indices on the CPU may be used anywhere.
    free = operation is torch.ops.aten.index.Tensor
    places = {t.device for t in tensors if t.device != _CPU or (t.ndim and not free)}
    if len(places) > 1 and operation not in _MOVING:
        raise RuntimeError(f"{operation} on tensors of {places}")
    masked = operation is torch.ops.aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[1:])
    if ((masked or operation in _FETCHING) and places) or (operation in _MOVING and _crosses(tensors, kwargs)):
        _waits.append(str(operation))
    target = kwargs.get("device")
    place = torch.device(target) if target is not None else next((t.device for t in tensors if t.device != _CPU), _CPU)
    if target is not None:
        kwargs = kwargs | {"device": _CPU}
    args, kwargs = tree_map_only(_Placed, lambda tensor: tensor.value, (args, kwargs))
    result = operation(*args, **kwargs)
    return result if place == _CPU else tree_map_only(torch.Tensor, lambda tensor: _Placed(tensor, place), result)


def _crosses(tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor is moved between devices: a number on the CPU that meets a device travels with the launch."""
    to = kwargs.get("device")
    return len({tensor.device for tensor in tensors} | ({torch.device(to)} if to is not None else set())) > 1
