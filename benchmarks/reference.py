"""The inputs and references of the benchmarks: the published algorithm, and this machine's limits (see bench.py)."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_ray.config import Config
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """One measurement; a ratio is how many times faster than the reference, or slower than the limit."""

    part: str
    case: str
    value: float
    unit: str
    times_reference: float | None = None
    times_limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """The inputs of a benchmark.

    Attributes:
        model: the model.
        tokens: the prompt, (seq,) int64.
        base: θ₀, (d_model,) float32.
        config: layers, radius and the other options.
        repeats: number of timings per case, of which the median is reported.
        quick: smaller sizes, fewer cases.
    """

    model: LanguageModel
    tokens: Int[Tensor, " seq"]
    base: Float[Tensor, " d_model"]
    config: Config
    repeats: int
    quick: bool

    def slice(self, *prompts: Tensor, evaluations: int = 0) -> Slice:
        """The slice on these prompts, or on the bench's own; so many evaluations are to come."""
        layers = self.config.source_layer, self.config.target_layer
        return Slice(self.model, prompts or [self.tokens], *layers, evaluations)


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    pass


class Reference:
    """The published algorithm: at every step a hooked forward pass of the whole model up to the target layer.

    z is the mean over positions of the target layer's output, the loss ‖z(θ) − z(θ₀)‖; Adam, then the part of θ along
    each earlier vector is subtracted. Nothing above the target layer runs.
    """

    def __init__(self, bench: Bench, start: Tensor, taken: Float[Tensor, "n d_model"]) -> None:
        self.bench, self.taken = bench, taken.to(bench.model.device)
        self.tokens = bench.tokens[None].to(bench.model.device)
        with torch.no_grad():
            self.z_base = self.z(bench.base.to(bench.model.device))
        self.theta = start.to(bench.model.device).clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.theta], lr=0.01 * float(bench.config.radius) / 7)

    def z(self, theta: Tensor) -> Tensor:
        """The mean over the positions that count of the target layer's output, θ added after the source layer."""
        model, config, found = self.bench.model, self.bench.config, []

        def add(_layer: torch.nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            h = output[0] if isinstance(output, tuple) else output
            h = (h.float() + theta).to(h.dtype)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        def read(_layer: torch.nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hooks = [(config.source_layer, add), (config.target_layer, read)]
        handles = [model.layers[layer].register_forward_hook(hook) for layer, hook in hooks]
        try:
            model.network(input_ids=self.tokens, use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found[0][0].float()[config.z_from :].mean(0)

    def step(self) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        loss = (self.z(self.theta) - self.z_base).norm()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.theta -= (self.theta @ self.taken.T) @ self.taken
        return loss.detach()


def timed(work: Mapping[K, Callable[[], object]], repeats: int, device: torch.device) -> dict[K, float]:
    """Median seconds of each, the repeats interleaved after one unmeasured round."""
    seconds: dict[K, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            start = now(device)
            function()
            if turn:
                seconds[name].append(now(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def now(device: torch.device) -> float:
    """The time in seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best: a large product and a large copy, to be timed beside what is measured.

    Attributes:
        work: both, by name.
        operations: floating-point operations of the product.
        bytes: bytes that the copy reads and writes.
    """

    work: dict[str, Callable[[], object]]
    operations: float
    bytes: float

    def rates(self, median: dict[str, float]) -> tuple[float, float]:
        """Floating-point operations, and bytes, a second."""
        return self.operations / median["matrix product"], self.bytes / median["copy"]

    def seconds(self, median: dict[str, float], slice: Slice, batch: int = 1) -> tuple[float, str]:
        """The least time (seconds) that a step of `batch` vectors can take, and what bounds it."""
        times = [cost / rate for cost, rate in zip(_cost(slice, batch), self.rates(median), strict=True)]
        return max(times), "products" if times[0] > times[1] else "memory"


def limits(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Limits:
    """What to time for this device and type; quick: too small to be a limit."""
    size, count = (8192, 1 << 29) if device.type == "cuda" else (256, 1 << 20) if quick else (1536, 1 << 25)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = {"matrix product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    return Limits(work, 2.0 * size**3, 2.0 * count)


def _cost(slice: Slice, batch: int) -> tuple[float, float]:
    """Operations and bytes that a step cannot do without: the weights read twice, forward and backward products."""
    layers = slice.model.layers[slice.source + 1 : slice.target + 1]
    weights = [weight for layer in layers for weight in layer.parameters() if weight.ndim == 2]
    count = sum(weight.numel() for weight in weights)
    tokens = batch * slice.h_source.shape[1]
    return 4.0 * count * tokens, 2.0 * sum(weight.numel() * weight.element_size() for weight in weights)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ of the worst row; infinite where either is not finite."""
    ours, theirs = (part.detach().double().cpu() for part in (ours, theirs))
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    ours, theirs = (part.reshape(len(part), -1) for part in (ours, theirs))
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)).max())


def dtype_of(model: LanguageModel) -> str:
    """The name of its dtype."""
    return str(model.dtype).removeprefix("torch.")
