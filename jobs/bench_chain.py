"""The chain's benchmarks: a step, time to equal loss, vectors per hour (see jobs/bench.py)."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.config import Config, first_line
from melbo_ray.engines import Recorded
from melbo_ray.model import LanguageModel
from melbo_ray.ortho import _Chain, chains, value_and_grad
from melbo_ray.residual import Slice
from melbo_ray.solvers import BlockSolver, Solution


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
    """What is measured: a model, a prompt, a base, layers and options, and how often."""

    model: LanguageModel
    tokens: Int[Tensor, " seq"]
    base: Float[Tensor, " d_model"]
    config: Config
    repeats: int
    quick: bool

    def slice(self, *prompts: Tensor) -> Slice:
        """The slice on these prompts, or on the bench's own."""
        return Slice(self.model, prompts or [self.tokens], self.config.source_layer, self.config.target_layer)


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
        self.optimizer = torch.optim.Adam([self.theta], lr=0.01 * bench.config.radius / 7)

    def z(self, theta: Tensor) -> Tensor:
        """The mean over positions of the target layer's output, θ added after the source layer."""
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
        return found[0][0].float().mean(0)

    def step(self) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        loss = (self.z(self.theta) - self.z_base).norm()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.theta -= (self.theta @ self.taken.T) @ self.taken
        return loss.detach()


def timed(work: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, the repeats interleaved after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            start = _now(device)
            function()
            if turn:
                seconds[name].append(_now(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best: a large product and a large copy, to be timed beside what is measured."""

    work: dict[str, Callable[[], object]]
    operations: float
    bytes: float

    def rates(self, median: dict[str, float]) -> tuple[float, float]:
        """Floating-point operations, and bytes, a second."""
        return self.operations / median["matrix product"], self.bytes / median["copy"]

    def seconds(self, median: dict[str, float], slice: Slice, batch: int = 1) -> tuple[float, str]:
        """The least time that a step can take, and what bounds it."""
        times = [cost / rate for cost, rate in zip(_cost(slice, batch), self.rates(median), strict=True)]
        return max(times), "products" if times[0] > times[1] else "memory"


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """What to time for this device and type."""
    size, count = (8192, 1 << 29) if device.type == "cuda" else (1536, 1 << 25)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.uint8, device=device)
    place = torch.empty_like(source)
    work = {"matrix product": lambda: a @ b, "copy": lambda: place.copy_(source)}
    return Limits(work, 2.0 * size**3, 2.0 * count)


def _cost(slice: Slice, batch: int) -> tuple[float, float]:
    """Operations and bytes that a step cannot do without: the weights read twice, forward and backward products."""
    layers = slice.model.layers[slice.source + 1 : slice.target + 1]
    weights = [weight for layer in layers for weight in layer.parameters() if weight.ndim == 2]
    count = sum(weight.numel() for weight in weights)
    tokens = batch * slice.h_source.shape[1]
    return 4.0 * count * tokens, 2.0 * sum(weight.numel() * weight.element_size() for weight in weights)


def _plain(slice: Slice) -> Slice:
    """The slice without any engine."""
    layers = slice.model.layers[slice.source + 1 : slice.target + 1]
    slice._calls = [(layer, arguments) for layer, (_, arguments) in zip(layers, slice._calls, strict=True)]
    slice.value_and_grad = slice._value_and_grad
    return slice


def recorded(slice: Slice) -> Slice:
    """The slice with its steps recorded from the first call on, as they are in a chain after some vectors."""
    slice.value_and_grad = Recorded(slice._value_and_grad, after=1)
    return slice


def stepper(slice: Slice, config: Config, theta: Tensor, z: Tensor) -> Callable[[], object]:
    """One step's value and gradient of these vectors, as a chain calls it."""
    rows = torch.arange(len(theta)) % slice.num_prompts
    return lambda: value_and_grad(slice, theta, z, rows, config)


def steps(bench: Bench) -> Iterator[Row]:
    """A step by every engine, against the reference and against what this machine's products and copies allow."""
    model, config, device = bench.model, bench.config, bench.model.device
    start = normalize(torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(0))) * config.radius
    reference = Reference(bench, start[0], normalize(bench.base[None]))
    engine = "CUDA graph" if device.type == "cuda" else "packed weights, recorded"
    slices = {"plain": _plain(bench.slice()), engine: recorded(bench.slice())}
    compile_seconds, best = 0.0, limits(device, model.dtype)
    work = best.work | {"reference": reference.step}
    for name, slice in slices.items():
        work[name] = stepper(slice, config, start, reference.z_base[None])
    if not bench.quick:
        compiled = _plain(bench.slice())
        compiled.h_target = torch.compile(compiled.h_target)
        step, begin = stepper(compiled, config, start, reference.z_base[None]), _now(device)
        try:
            step()
        except Exception as error:  # what a compiler that is missing or fails raises is its own
            yield Row("step", "torch.compile", math.nan, "ms", note=f"cannot compile: {first_line(error)}")
        else:
            compile_seconds, work["torch.compile"] = _now(device) - begin, step
    median = timed(work, bench.repeats, device)
    rates = best.rates(median)
    yield Row("limits", "large matrix product", rates[0] / 1e9, "GFLOP/s")
    yield Row("limits", "large copy, read and write", rates[1] / 1e9, "GB/s")
    limit, which = best.seconds(median, slices["plain"])
    yield Row("step", f"limit ({which})", limit * 1e3, "ms", note=f"{len(bench.tokens)} tokens, {model.dtype}")
    for name in [name for name in work if name not in best.work]:
        note = f"compiled in {compile_seconds:.0f} s" if name == "torch.compile" else ""
        ratio = median["reference"] / median[name]
        yield Row("step", name, median[name] * 1e3, "ms", ratio, median[name] / limit, note)


def equal_loss(bench: Bench) -> Iterator[Row]:
    """Time to the loss that the reference has after its Adam steps, from the same starts, vector by vector."""
    steps, vectors = (30, 1) if bench.quick else (300, 3)
    config = bench.config.model_copy(update={"max_evaluations": 1000, "tolerance": 0.0, "num_vectors": vectors})
    slice, device = bench.slice(), bench.model.device
    begin = _now(device)
    link = _Chain(slice, 0, bench.base, config, "code", ())
    theta = next(link.solver())
    # The first call records the step on CUDA.
    value_and_grad(slice, theta, link.z_base[None], torch.tensor([0]), config)
    yield Row("equal loss", "set up the chain, once", _now(device) - begin, "s")
    for index in range(1, vectors + 1):
        solver = link.solver()
        theta = next(solver)
        reference = Reference(bench, theta[0], link.subspace.basis.clone())
        begin = _now(device)
        for _ in range(steps):
            reference.step()
        reference_seconds = _now(device) - begin
        wanted = float((reference.z(reference.theta.detach()) - reference.z_base).norm())
        case, share = f"vector {index}: ", wanted / link.unsteered_loss
        note = f"relative loss {share:.3f}, norm {float(reference.theta.detach().norm()):.1f}"
        yield Row("equal loss", f"{case}reference, {steps} Adam steps", reference_seconds, "s", 1.0, None, note)
        begin = _now(device)
        solution = _until(wanted, solver, theta, link)
        seconds = _now(device) - begin
        (found,) = link.add(solution)
        note = f"{solution.evaluations} evaluations, relative loss {found.relative_loss:.3f}, norm {found.norm:.1f}"
        # In bfloat16 a line search may end above it: then there is no ratio.
        ratio = reference_seconds / seconds if solution.stop_reason == "reached" else None
        case, note = f"{case}{config.solver}", note if ratio else f"NOT REACHED ({solution.stop_reason}): {note}"
        yield Row("equal loss", case, seconds, "s", ratio, None, note)


def _until(wanted: float, solver: BlockSolver, theta: Tensor, link: _Chain) -> Solution:
    """Drive a solver from its first request until the loss is `wanted` or it ends."""
    evaluations = 0
    while True:
        losses, gradients = value_and_grad(link.slice, theta, link.z_base[None], link.row, link.config)
        evaluations += 1
        if losses[0] <= wanted:
            return Solution(theta, evaluations, "reached")
        try:
            theta = solver.send((losses, gradients))
        except StopIteration as finished:
            return finished.value


def throughput(bench: Bench) -> Iterator[Row]:
    """Vectors per hour as chains are run by default, solver and all: one concept, several in one pass, and blocks.

    The concepts are one prompt and base under several names: what they cost each other is the same.
    """
    count = 1 if bench.quick else 4
    for concepts, size in (1, 1), (4, 1), (1, 4):
        config = bench.config.model_copy(update={"num_vectors": count * size, "block": size})
        bases = {f"concept {number}": bench.base for number in range(concepts)}
        slice = bench.slice(*[bench.tokens] * concepts)
        begin, stopped = _now(bench.model.device), {}
        found = [vector for _, vector in chains(slice, bases, config, {}, stopped)]
        hour = 3600 * len(found) / (_now(bench.model.device) - begin)
        losses = statistics.median(vector.relative_loss for vector in found)
        evaluations = statistics.mean(vector.evaluations for vector in found)
        note = f"{len(found)} vectors with all set-up, {evaluations:.0f} evaluations each, relative loss {losses:.3f}"
        yield Row("chain", f"{concepts} concepts at once, blocks of {size}", hour, "vectors/h", note=note)
