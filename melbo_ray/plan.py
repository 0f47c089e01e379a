"""What a study will take before anything of it starts: memory, GPUs, time, bytes."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from melbo_ray.check import Checked
from melbo_ray.config import Config
from melbo_ray.model import LanguageModel, pick_device
from melbo_ray.partial import sketch
from melbo_ray.progress import duration

_GPU_SIZES = (24, 48, 80, 141)
_USABLE = 0.9
# Kept for the backward pass by one decoder layer, in values a token, as multiples of d_model.
_ACTIVATIONS = 40
# From a synthetic run of 1,000 vectors (tests/cluster/figures.py storage): the rows of the evaluations, bytes a vector.
_ROW_BYTES = 2_000
_VECTOR_BYTES = 4.3


@dataclass(frozen=True)
class Machine:
    """How fast this machine is, measured.

    Attributes:
        device: where.
        flops: floating-point operations a second of a large matrix product in the model's dtype.
        bandwidth: bytes a second that a large copy reads and writes.
    """

    device: str
    flops: float
    bandwidth: float


def calibrate(config: Config, dtype: torch.dtype, seconds: float = 0.3) -> Machine:
    """Measure this machine for about a second."""
    device = pick_device(config.device)
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    block = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    products = _rate(lambda: left @ right, device, seconds)
    copies = _rate(block.clone, device, seconds)
    return Machine(str(device), 2 * size**3 * products, 2 * block.numel() * copies)


def plan(checked: Checked, machine: Machine | None = None) -> Table:
    """A table of what the study needs and takes; times are for machines like this one.

    Time counts every vector at its most evaluations, so it is an upper bound of the chain's.
    """
    config, model = checked.config, sketch(checked.config)
    machine = machine or calibrate(config, model.dtype)
    lengths = [len(model.tokenize(concept.prompt, config.system_prompt)) for concept in checked.concepts]
    upper = _count(model.layers[config.target_layer + 1 :])
    slice_values = _count(model.layers[config.source_layer + 1 : config.target_layer + 1])
    each = model.dtype.itemsize
    whole = _count([model.network])
    chain = each * (whole - upper) + _chain_work(config, model, lengths)
    evaluator = each * whole + _evaluator_work(config, model, max(lengths))
    step = max(4 * slice_values * sum(lengths) / machine.flops, 2 * each * slice_values / machine.bandwidth)
    steps = config.num_vectors * config.max_evaluations
    vectors = config.num_vectors * len(lengths)
    text = model.network.config.get_text_config()
    size = vectors * (_VECTOR_BYTES * text.hidden_size + _ROW_BYTES)
    table = Table("", "", title=f"Plan for {config.model}", title_justify="left")
    for name, value in {
        "parameters": f"{whole / 1e9:.2f} billion, {each * whole / 1e9:.1f} GB as {model.dtype}",
        "the chain reads of them": f"{(whole - upper) / 1e9:.2f} billion; a step runs {slice_values / 1e9:.2f} billion",
        "memory of a chain actor": f"{chain / 1e9:.1f} GB: {_gpus(chain)}",
        "memory of an evaluator": f"{evaluator / 1e9:.1f} GB: {_gpus(evaluator)}",
        "a step of the chain": f"at least {1000 * step:.2g} ms on {machine.device} (concepts in it: {len(lengths)})",
        "the chain": f"{vectors} vectors, {steps} steps at most: {duration(steps * step)}",
        "storage": f"{size / 1e6:.0f} MB",
        "this machine": f"{machine.flops / 1e12:.2f} TFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s on {machine.device}",
    }.items():
        table.add_row(name, value)
    return table


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _chain_work(config: Config, model: LanguageModel, lengths: list[int]) -> int:
    """Activations that the backward pass needs, and the basis, bytes."""
    layers = config.target_layer - config.source_layer
    activations = sum(lengths) * layers * _ACTIVATIONS * model.d_model * model.dtype.itemsize
    return activations + config.num_vectors * len(lengths) * model.d_model * 4


def _evaluator_work(config: Config, model: LanguageModel, length: int) -> int:
    """Keys and values of a batch of texts, and its logits, bytes."""
    text = model.network.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tokens = config.eval_batch * (length + config.max_new_tokens)
    cache = 2 * tokens * text.num_hidden_layers * width * model.dtype.itemsize
    return cache + config.eval_batch * length * text.vocab_size * 4


def _gpus(needed: float) -> str:
    """On how many GPUs of each size it fits, for the sizes where it needs no more than eight."""
    counts = {size: math.ceil(needed / (_USABLE * size * 1e9)) for size in _GPU_SIZES}
    return " or ".join(f"{count} x {size} GB" for size, count in counts.items() if count <= 8) or "more than 8 GPUs"


def _rate(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How many times a second `work` runs."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        wait()
        count += 1
    return count / (time.perf_counter() - start)
