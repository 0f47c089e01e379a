"""The speed of this machine: large products, large copies, and each evaluation on a few layers of the model's shape."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import EVALUATIONS, PER_VECTOR
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.architecture import truncate
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import load_config, pick_device
from melbo_ray.model.partial import sketch
from melbo_ray.model.products import require_products
from melbo_ray.study.preflight import Checked

# Layers of the two timed models, whose difference gives the time per layer.
_DEPTHS = (2, 10)
# Maximum bytes of the larger model: a plan must not need the memory that it estimates.
_ROOM = {"cpu": 4e9, "cuda": 20e9}
# Vectors in a timed batch: on the CPU the time per row hardly depends on the batch.
_CPU_BATCH = 2


@dataclass(frozen=True)
class Machine:
    """The measured speed of this machine.

    Attributes:
        device: the device.
        flops: floating-point operations per second of a large matrix product in the model's dtype.
        bandwidth: bytes per second that a large copy reads and writes.
        evaluations: seconds per vector of each per-vector evaluation, extrapolated to the whole model; on the CPU with
            one thread, like evaluators. Empty if a few layers are too large for this machine.
        measured: description of the timed models.
    """

    device: str
    flops: float
    bandwidth: float
    evaluations: dict[str, float]
    measured: str


def calibrate(checked: Checked, seconds: float = 0.3) -> Machine:
    """Measure this machine: about a second, plus the time of a few vectors in every evaluation on a few layers."""
    model = sketch(checked.config)
    device = pick_device(checked.config.device)
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(model.dtype) for _ in range(2))
    block = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    products = _rate(lambda: left @ right, device, seconds)
    copies = _rate(block.clone, device, seconds)
    evaluations, measured = _evaluations(checked, model, device)
    return Machine(str(device), 2 * size**3 * products, 2 * block.numel() * copies, evaluations, measured)


def _evaluations(checked: Checked, model: LanguageModel, device: torch.device) -> tuple[dict[str, float], str]:
    config, depth = checked.config, len(model.layers)
    room = _ROOM[device.type] // sum(parameter.nbytes for parameter in model.layers[0].parameters())
    few, more = (int(min(layers, depth, room)) for layers in _DEPTHS)
    if few >= more:
        return {}, f"no evaluation was timed: {_DEPTHS[0]} and more layers are too large for this machine"
    try:
        require_products(config.eval_products, device, model.dtype)
    except UserError as error:  # the machines of the cluster may have them
        return {}, f"no evaluation was timed: {error}"
    batch = config.eval_batch if device.type == "cuda" else _CPU_BATCH
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [_time(checked, model, layers, batch, device) for layers in (few, more)]
    finally:
        torch.set_num_threads(threads)
    found = {}
    for name in times[0]:
        layers = depth if EVALUATIONS[name].every_layer else depth - config.source_layer
        found[name] = extrapolate((few, times[0][name]), (more, times[1][name]), layers)
    return found, (
        f"{batch} vectors through {few} and {more} of {depth} layers with random weights, every text at its full length"
    )


def extrapolate(one: tuple[int, float], other: tuple[int, float], layers: int) -> float:
    """The time at `layers`, on the line through two points (layers, time), whose slope is at least 0."""
    each = max(0.0, (other[1] - one[1]) / (other[0] - one[0]))
    return max(0.0, one[1] + each * (layers - one[0]))


def _time(checked: Checked, whole: LanguageModel, layers: int, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds per vector of each per-vector evaluation on a model of `layers` layers, with θ added after the first."""
    config: Config = checked.config
    shape = load_config(config.model, config.revision, config.trust_remote_code)
    shape = truncate(shape, layers, of=len(whole.layers))
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(shape, dtype=whole.dtype, trust_remote_code=config.trust_remote_code)
    model = LanguageModel.wrap(network, whole.tokenizer, name=config.model, layers=config.layers)
    draws = torch.randn(batch + 2, model.d_model, generator=torch.Generator().manual_seed(0))
    base, first, *_ = thetas = normalize(draws, dim=-1)
    study = Study(model, config.model_copy(update={"source_layer": 0}), checked.concepts[0], "plan", base)
    found = {}
    for name in PER_VECTOR:
        evaluate(name, study, Vectors("chain", [1], first[None]))  # warm-up, with the values that are computed once
        start = time.perf_counter()
        evaluate(name, study, Vectors("chain", range(2, batch + 2), thetas[2:]))
        found[name] = (time.perf_counter() - start) / batch
    return found


def _rate(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Number of runs of `work` per second."""

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
