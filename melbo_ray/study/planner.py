"""The plan of a study: its estimated memory, GPUs, time and storage."""

import math
from collections import Counter
from collections.abc import Iterable

import torch
from rich.table import Table
from torch import nn

from melbo_ray.cluster.memory import USABLE, Demand
from melbo_ray.config import Config
from melbo_ray.evals.catalog import CONTROLS, EVALUATIONS, SAMPLED
from melbo_ray.host import cores
from melbo_ray.model.partial import sketch
from melbo_ray.search.preconditioner import TARGETS
from melbo_ray.study.calibration import Machine, calibrate
from melbo_ray.study.display import duration
from melbo_ray.study.preflight import Checked

_GPU_SIZES = (24, 48, 80, 141)
# From a synthetic run of 1,000 vectors (tests/cluster/figures.py storage): the rows of the evaluations, bytes a vector.
_ROW_BYTES = 2_000
_VECTOR_BYTES = 4.3


def plan(checked: Checked, machine: Machine | None = None) -> Table:
    """A table of the study's estimated memory, time and storage, with times for machines like this one.

    The chain's time assumes the maximum number of loss evaluations for every vector.
    """
    config, model = checked.config, sketch(checked.config)
    machine = machine or calibrate(checked)
    lengths = [len(model.tokenize(concept.prompt, config.system_prompt)) for concept in checked.concepts]
    upper = _count(model.layers[config.target_layer + 1 :])
    chain, evaluator = checked.demands.chain, checked.demands.evaluator
    slice_values = _count(model.layers[config.source_layer + 1 : config.target_layer + 1])
    each = model.dtype.itemsize
    whole = _count([model.network])
    step = max(4 * slice_values * sum(lengths) / machine.flops, 2 * each * slice_values / machine.bandwidth)
    steps = config.num_vectors * config.max_evaluations + (TARGETS if config.solver == "lbfgs" else 0)
    vectors = config.num_vectors * len(lengths)
    text = model.network.config.get_text_config()
    size = vectors * (_VECTOR_BYTES * text.hidden_size + _ROW_BYTES)
    table = Table("", "", title=f"Plan for {config.model}", title_justify="left")
    for name, value in {
        "parameters": f"{whole / 1e9:.2f} billion, {each * whole / 1e9:.1f} GB as {model.dtype}",
        "the chain reads of them": f"{(whole - upper) / 1e9:.2f} billion; a step runs {slice_values / 1e9:.2f} billion",
        "memory of a chain actor": f"{_on_cpu(chain)}; {chain.on_gpu / 1e9:.1f} GB: {_gpus(chain.on_gpu, most=1)}",
        "memory of an evaluator": f"{_on_cpu(evaluator)}; {evaluator.on_gpu / 1e9:.1f} GB: "
        f"{_gpus(evaluator.on_gpu)}{_span(config, evaluator.on_gpu)}",
        "a step of the chain": f"at least {1000 * step:.2g} ms on {machine.device} (concepts in it: {len(lengths)})",
        "the chain": f"{vectors} vectors, {steps} steps at most: {duration(steps * step)}",
        "the evaluations": _evaluations(config, machine, vectors, len(lengths), step / len(lengths)),
        "storage": f"{size / 1e6:.0f} MB",
        "this machine": f"{machine.flops / 1e12:.2f} TFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s on {machine.device}",
    }.items():
        table.add_row(name, value)
    return table


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _on_cpu(demand: Demand) -> str:
    """The memory of a worker on the CPU, with and without packed copies of the weights."""
    return f"{demand.on_cpu(True) / 1e9:.1f} GB on a CPU, {demand.on_cpu(False) / 1e9:.1f} where more is not to be had"


def _gpus(needed: float, most: int = 8) -> str:
    """The number of GPUs of each size that hold `needed` bytes, for sizes that need at most `most` GPUs."""
    counts = {size: math.ceil(needed / (USABLE * size * 1e9)) for size in _GPU_SIZES}
    fitting = " or ".join(f"{count} x {size} GB" for size, count in counts.items() if count <= most)
    return fitting or f"more than {most} x {_GPU_SIZES[-1]} GB"


def _span(config: Config, needed: float) -> str:
    if config.eval_gpus is not None and config.eval_gpus > 1:
        return f"; spread over {config.eval_gpus:g} (--eval-gpus)"
    return "; --eval-gpus spreads it over several" if needed > USABLE * _GPU_SIZES[-1] * 1e9 else ""


def _evaluations(config: Config, machine: Machine, vectors: int, concepts: int, step: float) -> str:
    """The evaluations' time on one evaluator and on this machine's maximum, and the evaluations not included.

    `step` is the time of a chain's step, s, for the vectors that an evaluation finds itself.
    """
    if not machine.evaluations:
        return machine.measured
    runs = runs_of_evaluations(config.evals, vectors // concepts, config.sample)
    searched = sum(EVALUATIONS[name].searched(vectors // concepts) for name in config.evals)
    each = sum(machine.evaluations[name] * count for name, count in runs.items())
    total = concepts * (each + searched * config.max_evaluations * step)
    room = cores() if machine.device == "cpu" else int(torch.cuda.device_count() // max(1.0, config.eval_gpus or 0.0))
    evaluators = config.max_evaluators or max(1, room)
    left_out = [name for name in config.evals if not counted(name)]
    return (
        f"{duration(total)} on one evaluator like this machine, {duration(total / evaluators)} on {evaluators}; "
        f"from {machine.measured}; not counted: {', '.join(left_out) or 'none'}"
    )


def counted(name: str) -> bool:
    """Whether the time of an evaluation is counted."""
    return EVALUATIONS[name].scope == "vector" or EVALUATIONS[name].passes is not None


def runs_of_evaluations(names: Iterable[str], vectors: int, sample: int | None = None) -> Counter[str]:
    """The number of vectors in each per-vector evaluation, including those evaluated for a whole chain."""
    runs: Counter[str] = Counter()
    for name in names:
        evaluation = EVALUATIONS[name]
        if evaluation.passes is not None:
            runs.update(evaluation.passes(vectors))
        elif evaluation.scope == "vector":
            runs[name] += (min(vectors, sample or vectors) if name in SAMPLED else vectors) + len(CONTROLS)
    return runs
