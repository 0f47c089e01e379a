"""How a model's layers multiply: as torch does by itself, or rounded, for evaluations that may (`eval_products`).

On a GPU `tf32` rounds the factors to 11 bits. On the CPU `bfloat16` rounds factors and products of the linear layers to
8 bits, and adds in float32. The head multiplies in float32 there: between 16 and 32, bfloat16 logits lie 0.125 nats
apart, which would be most of the error.
"""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from melbo_ray.errors import UserError
from melbo_ray.model import packed_linear
from melbo_ray.model.language_model import LanguageModel

FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
# oneDNN packs for a number of rows; measured at 16 to 2,048 rows, the copies do not differ.
_ROWS = 16


def require_products(products: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a device can multiply so.

    Raises:
        UserError: the device has no such products, or the weights are rounded already.
    """
    if products == FLOAT32:
        return
    if dtype != torch.float32:
        raise UserError(f"`eval_products` {products}: expected float32 weights, and these are {dtype}: leave it out")
    if products == TF32:
        has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        expected = "an NVIDIA GPU of compute capability 8.0 or more"
    else:
        has = device.type == "cpu" and packed_linear.available() and _multiplies_bfloat16()
        expected = "a CPU with AVX-512 BF16 or AMX"
    if not has:
        where = "this GPU" if device.type == "cuda" else "this processor"
        raise UserError(f"`eval_products` {products}: expected {expected}, and {where} is none: use float32")


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def multiplying(model: LanguageModel) -> Generator[None]:
    """Within the context, the layers multiply as `model.products` says; without gradients."""
    if model.products == TF32:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    elif model.products == BFLOAT16:
        with _Rounded(model):
            yield
    else:
        yield


class _Rounded(TorchFunctionMode):
    """Linear layers but the head's with bfloat16 copies of their weights, which are made once a model."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._head = model.network.get_output_embeddings().weight
        self._copies: dict[Tensor, Tensor] = model.kept.setdefault("rounded weights", {})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.linear or kwargs or args[1] is self._head or not packed_linear.suits(*args):
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        if weight not in self._copies:
            self._copies[weight] = packed_linear.packed_copy(weight.detach().bfloat16(), _ROWS)
        product = packed_linear.product(x.bfloat16(), self._copies[weight]).float()
        return product if not bias or bias[0] is None else product + bias[0]
