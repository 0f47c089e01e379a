"""The chain's benchmarks: a step, time to equal loss, vectors per hour (see bench.py)."""

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.reference import Bench, Reference, Row, limits, now, timed
from melbo_ray.config import Config
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search import lockstep
from melbo_ray.search.chain import Chain, chains
from melbo_ray.search.preconditioner import preconditioner
from melbo_ray.search.solvers import Solution

# Evaluations of a chain of the whole space.
_LONG = 20_000


def stepper(slice: Slice, config: Config, theta: Tensor, z: Tensor) -> Callable[[], object]:
    """One step's value and gradient of these vectors, as a chain calls it."""
    rows = torch.arange(len(theta)) % slice.num_prompts
    return lambda: lockstep.value_and_grad(slice, theta, z, rows, config)


def steps(bench: Bench) -> Iterator[Row]:
    """A step by every engine, against the reference and against what this machine's products and copies allow."""
    model, config, device = bench.model, bench.config, bench.model.device
    start = normalize(torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(0))) * float(config.radius)
    reference = Reference(bench, start[0], normalize(bench.base[None]))
    slice, best = bench.slice(), limits(device, model.dtype)
    graph = "CUDA graph" if device.type == "cuda" else "recorded"
    engines: dict[str, Any] = {"plain": slice._value_and_grad, graph: Recorded(slice._value_and_grad)}
    if not bench.quick:
        engines[f"compiled, {graph}"] = Recorded(slice._value_and_grad, compiled=True)
    work, notes = best.work | {"reference": reference.step}, {}
    for name, engine in engines.items():
        part, begin = copy.copy(slice), now(device)
        part.value_and_grad = engine
        work[name] = stepper(part, config, start, reference.z_base[None])
        notes[name] = f"{_told(work[name])}first call {now(device) - begin:.1f} s"
    median = timed(work, bench.repeats, device)
    rates = best.rates(median)
    yield Row("limits", "large matrix product", rates[0] / 1e9, "GFLOP/s")
    yield Row("limits", "large copy, read and write", rates[1] / 1e9, "GB/s")
    limit, which = best.seconds(median, slice)
    yield Row("step", f"limit ({which})", limit * 1e3, "ms", note=f"{len(bench.tokens)} tokens, {model.dtype}")
    for name in ["reference", *engines]:
        ratio = median["reference"] / median[name]
        yield Row("step", name, median[name] * 1e3, "ms", ratio, median[name] / limit, notes.get(name, ""))


def _told(step: Callable[[], object]) -> str:
    """Run the first step; returns the warnings about engines that failed."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        step()
    return "".join(f"{warning.message}; " for warning in told)


def equal_loss(bench: Bench) -> Iterator[Row]:
    """Time to the loss that the reference has after its Adam steps, from the same starts, vector by vector."""
    steps, vectors = (30, 1) if bench.quick else (300, 3)
    config = bench.config.model_copy(update={"max_evaluations": 1000, "tolerance": 0.0, "num_vectors": vectors})
    slice, device = bench.slice(), bench.model.device
    begin = now(device)
    chain = Chain(slice, 0, bench.base, config, "code")
    # The first call records the step on CUDA.
    stepper(slice, config, chain.start(), chain.z_base[None])()
    preconditioner(slice, [0], chain.options)
    yield Row("equal loss", "set up the chain, once", now(device) - begin, "s")
    for index in range(1, vectors + 1):
        reference = Reference(bench, chain.start()[0], chain.subspace.basis.clone())
        begin = now(device)
        for _ in range(steps):
            reference.step()
        reference_seconds = now(device) - begin
        wanted = float((reference.z(reference.theta.detach()) - reference.z_base).norm())
        case, share = f"vector {index}: ", wanted / chain.unsteered_losses[0]
        note = f"relative loss {share:.3f}, norm {float(reference.theta.detach().norm()):.1f}"
        yield Row("equal loss", f"{case}reference, {steps} Adam steps", reference_seconds, "s", 1.0, None, note)
        begin = now(device)
        solution = _until(wanted, chain)
        seconds = now(device) - begin
        (found,) = chain.add(solution)
        note = f"{solution.evaluations} evaluations, relative loss {found.relative_loss:.3f}, norm {found.norm:.1f}"
        # In bfloat16 a line search may end above it: then there is no ratio.
        ratio = reference_seconds / seconds if solution.stop_reason == "reached" else None
        case, note = f"{case}{config.solver}", note if ratio else f"NOT REACHED ({solution.stop_reason}): {note}"
        yield Row("equal loss", case, seconds, "s", ratio, None, note)


def _until(wanted: float, chain: Chain) -> Solution:
    """Run the chain's next solver until its loss is at most `wanted` or it ends."""
    for count, step in enumerate(lockstep.steps({chain: chain.solver()}), 1):
        if step.losses[0] <= wanted:
            return Solution(step.theta, count, "reached")
        if step.solution is not None:
            return step.solution
    raise AssertionError("a solver ends with a solution")


def throughput(bench: Bench) -> Iterator[Row]:
    """Vectors per hour as long chains are run by default, solver and all: one concept, several in one pass, and blocks.

    The concepts are one prompt and base under several names: what they cost each other is the same. The first step,
    which makes the engine, and the preconditioner are taken before.
    """
    count, device = 1 if bench.quick else 4, bench.model.device
    for concepts, size in (1, 1), (4, 1), (1, 4):
        config = bench.config.model_copy(update={"num_vectors": count * size, "block": size})
        bases = {f"concept {number}": bench.base for number in range(concepts)}
        slice = bench.slice(*[bench.tokens] * concepts, evaluations=0 if bench.quick else _LONG)
        theta = bench.base.expand(concepts * size, -1)
        stepper(slice, config, theta, torch.zeros_like(theta))()
        preconditioner(slice, [row for row in range(concepts) for _ in range(size)], config)
        begin, stopped = now(device), {}
        found = [vector for _, vector in chains(slice, bases, config, {}, stopped)]
        hour = 3600 * len(found) / (now(device) - begin)
        losses = statistics.median(vector.relative_loss for vector in found)
        evaluations = statistics.mean(vector.evaluations for vector in found)
        note = f"{len(found)} vectors, {evaluations:.0f} evaluations each, relative loss {losses:.3f}"
        yield Row("chain", f"{concepts} concepts at once, blocks of {size}", hour, "vectors/h", note=note)
