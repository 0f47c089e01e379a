"""What a study will take before anything of it starts: memory, GPUs, time, bytes."""

import math
from collections import Counter
from collections.abc import Iterable

import torch
from rich.table import Table
from torch import nn

from melbo_ray.agenda import CONTROLS
from melbo_ray.calibration import Machine, calibrate
from melbo_ray.check import Checked
from melbo_ray.config import EVERY, Config
from melbo_ray.evals import EVALUATIONS
from melbo_ray.evals.control import COUNT
from melbo_ray.model import LanguageModel
from melbo_ray.partial import sketch
from melbo_ray.progress import duration
from melbo_ray.work import cores

_GPU_SIZES = (24, 48, 80, 141)
_USABLE = 0.9
# Kept for the backward pass by one decoder layer, in values a token, as multiples of d_model.
_ACTIVATIONS = 40
# From a synthetic run of 1,000 vectors (tests/cluster/figures.py storage): the rows of the evaluations, bytes a vector.
_ROW_BYTES = 2_000
_VECTOR_BYTES = 4.3


def plan(checked: Checked, machine: Machine | None = None) -> Table:
    """A table of what the study needs and takes; times are for machines like this one.

    The chain's time counts every vector at its most evaluations, so it is an upper bound.
    """
    config, model = checked.config, sketch(checked.config)
    machine = machine or calibrate(checked)
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
        "memory of a chain actor": f"{chain / 1e9:.1f} GB: {_gpus(chain, most=1)}",
        "memory of an evaluator": f"{evaluator / 1e9:.1f} GB: {_gpus(evaluator)}{_span(config, evaluator)}",
        "a step of the chain": f"at least {1000 * step:.2g} ms on {machine.device} (concepts in it: {len(lengths)})",
        "the chain": f"{vectors} vectors, {steps} steps at most: {duration(steps * step)}",
        "the evaluations": _evaluations(config, machine, vectors, len(lengths)),
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


def _gpus(needed: float, most: int = 8) -> str:
    """On how many GPUs of each size it fits, for the sizes where it needs no more than `most`."""
    counts = {size: math.ceil(needed / (_USABLE * size * 1e9)) for size in _GPU_SIZES}
    fitting = " or ".join(f"{count} x {size} GB" for size, count in counts.items() if count <= most)
    return fitting or f"more than {most} x {_GPU_SIZES[-1]} GB"


def _span(config: Config, needed: float) -> str:
    if config.eval_gpus is not None and config.eval_gpus > 1:
        return f"; spread over {config.eval_gpus:g} (--eval-gpus)"
    return "; --eval-gpus spreads it over several" if needed > _USABLE * _GPU_SIZES[-1] * 1e9 else ""


def _evaluations(config: Config, machine: Machine, vectors: int, concepts: int) -> str:
    """Their time on one evaluator and on those that this machine has room for, and what is not in it."""
    if not machine.evaluations:
        return machine.measured
    runs = runs_of_evaluations(config.evals, vectors // concepts, config.sample)
    total = concepts * sum(machine.evaluations[name] * count for name, count in runs.items())
    room = cores() if machine.device == "cpu" else int(torch.cuda.device_count() // max(1.0, config.eval_gpus or 0.0))
    evaluators = config.max_evaluators or max(1, room)
    left_out = [name for name in config.evals if name in ("shuffled", "composition", "geometry")]
    return (
        f"{duration(total)} on one evaluator like this machine, {duration(total / evaluators)} on {evaluators}; "
        f"from {machine.measured}; not counted: {', '.join(left_out) or 'none'}"
    )


def runs_of_evaluations(names: Iterable[str], vectors: int, sample: int | None = None) -> Counter[str]:
    """How many vectors go through each evaluation of single vectors, those of `control` and `rescaled` included."""
    runs: Counter[str] = Counter()
    for name in names:
        if EVALUATIONS[name].scope == "vector":
            runs[name] += (vectors if name in EVERY else min(vectors, sample or vectors)) + len(CONTROLS)
        elif name == "rescaled":  # at one norm, where kl has two
            runs["kl"] += math.ceil(vectors / 2)
        elif name == "control":
            for other in ("kl", "presence"):
                runs[other] += vectors + 1
            for other in ("generalization", "greedy", "generations", "dose"):
                runs[other] += min(vectors, COUNT) + 1
    return runs
