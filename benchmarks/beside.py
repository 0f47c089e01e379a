"""A step as `make run` takes it: on one thread, while an evaluator on this machine computes logits on another."""

import contextlib
import copy
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator

import torch
from torch.nn.functional import normalize

from benchmarks.chain import stepper
from benchmarks.reference import Bench, Reference, Row, timed
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.steering import Prompts

# Vectors per pass of the evaluator.
_VECTORS = 16


def beside(bench: Bench) -> Iterator[Row]:
    """The reference's step and the recorded one, on one thread, with the evaluator stopped and at work in turns."""
    if bench.model.device.type != "cpu":
        return
    theta = normalize(torch.randn(1, bench.model.d_model, generator=torch.Generator().manual_seed(0)))
    theta = theta * float(bench.config.radius)
    reference, slice = Reference(bench, theta[0], normalize(bench.base[None])), copy.copy(bench.slice())
    slice.value_and_grad = Recorded(slice._value_and_grad)
    steps = {"reference": reference.step, "recorded": stepper(slice, bench.config, theta, reference.z_base[None])}
    threads = torch.get_num_threads()
    with _evaluator(bench) as process:
        turns = [("alone", threads, signal.SIGSTOP), ("alone", 1, signal.SIGSTOP), ("beside", 1, signal.SIGCONT)]
        work = {
            (name, where, count): _turn(process, sent, count, step)
            for name, step in steps.items()
            for where, count, sent in dict.fromkeys(turns)
        }
        median = timed(work, bench.repeats, bench.model.device)
    torch.set_num_threads(threads)
    for (name, where, count), seconds in median.items():
        case = f"{name}, {'beside an evaluator' if where == 'beside' else 'alone'}, {count} threads"
        ratio = median["reference", where, count] / seconds
        note = f"{seconds / median[name, 'alone', 1]:.2f} times its time alone on one thread"
        yield Row("beside", case, seconds * 1e3, "ms", ratio, None, note)


def _turn(process: int, sent: int, threads: int, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        os.kill(process, sent)
        torch.set_num_threads(threads)
        return step()

    return run


@contextlib.contextmanager
def _evaluator(bench: Bench) -> Generator[int]:
    """The id of a process that computes logits of the bench's prompt under random vectors, on one thread."""
    generator = torch.Generator().manual_seed(1)
    thetas = normalize(torch.randn(_VECTORS, bench.model.d_model, generator=generator)) * float(bench.config.radius)
    prompts = Prompts(bench.model, [bench.tokens], bench.config.source_layer)
    # Forked, so that the weights are there once; on one thread, as the parent's other threads are not forked with it.
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def evaluate() -> None:
        torch.set_num_threads(1)
        while True:
            list(prompts.logits(thetas))
            ready.set()

    process = context.Process(target=evaluate, daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise RuntimeError("the evaluator beside did not begin")
        yield process.pid or 0
    finally:
        process.kill()  # a stopped one as well
        process.join()
