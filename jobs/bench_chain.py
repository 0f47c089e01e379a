"""The chain's benchmarks: a step, time to equal loss, vectors per hour (see jobs/bench.py)."""

import math
import statistics
from collections.abc import Callable, Iterator

import torch
from bench_reference import Bench, Reference, Row, limits, now, timed
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.config import Config, first_line
from melbo_ray.engines import Recorded
from melbo_ray.ortho import _Chain, chains, value_and_grad
from melbo_ray.residual import Slice
from melbo_ray.solvers import BlockSolver, Solution


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
        step, begin = stepper(compiled, config, start, reference.z_base[None]), now(device)
        try:
            step()
        except Exception as error:  # what a compiler that is missing or fails raises is its own
            yield Row("step", "torch.compile", math.nan, "ms", note=f"cannot compile: {first_line(error)}")
        else:
            compile_seconds, work["torch.compile"] = now(device) - begin, step
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
    begin = now(device)
    link = _Chain(slice, 0, bench.base, config, "code", ())
    theta = next(link.solver())
    # The first call records the step on CUDA.
    value_and_grad(slice, theta, link.z_base[None], torch.tensor([0]), config)
    yield Row("equal loss", "set up the chain, once", now(device) - begin, "s")
    for index in range(1, vectors + 1):
        solver = link.solver()
        theta = next(solver)
        reference = Reference(bench, theta[0], link.subspace.basis.clone())
        begin = now(device)
        for _ in range(steps):
            reference.step()
        reference_seconds = now(device) - begin
        wanted = float((reference.z(reference.theta.detach()) - reference.z_base).norm())
        case, share = f"vector {index}: ", wanted / link.unsteered_loss
        note = f"relative loss {share:.3f}, norm {float(reference.theta.detach().norm()):.1f}"
        yield Row("equal loss", f"{case}reference, {steps} Adam steps", reference_seconds, "s", 1.0, None, note)
        begin = now(device)
        solution = _until(wanted, solver, theta, link)
        seconds = now(device) - begin
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
        begin, stopped = now(bench.model.device), {}
        found = [vector for _, vector in chains(slice, bases, config, {}, stopped)]
        hour = 3600 * len(found) / (now(bench.model.device) - begin)
        losses = statistics.median(vector.relative_loss for vector in found)
        evaluations = statistics.mean(vector.evaluations for vector in found)
        note = f"{len(found)} vectors with all set-up, {evaluations:.0f} evaluations each, relative loss {losses:.3f}"
        yield Row("chain", f"{concepts} concepts at once, blocks of {size}", hour, "vectors/h", note=note)
