"""The correctness part of gpu.py: what must hold before a figure means anything, each against a plainer way."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.reference import Bench, dtype_of, relative
from benchmarks.shapes import random_model
from melbo_ray.concepts.loader import Concept
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import generate
from melbo_ray.model.steering import Prompts, kl
from melbo_ray.search.chain import Chain, chains
from melbo_ray.search.lockstep import steps
from melbo_ray.search.preconditioner import preconditioner

CONCEPTS = 4
# A chain that goes on, however little the vectors of a model with random weights do.
ENDLESS: dict[str, Any] = {"min_norm": 0.0, "max_relative_loss": math.inf, "tolerance": 0.0}


@dataclass(frozen=True)
class Check:
    """One comparison; it holds if its error is at most the tolerance and nothing fell back to a plainer way."""

    part: str
    case: str
    error: float
    tolerance: float
    note: str = ""
    fell_back: bool = False

    @property
    def holds(self) -> bool:
        """Whether it holds; an error that is not a number never does."""
        return self.error <= self.tolerance and not self.fell_back


@dataclass(frozen=True)
class Lab:
    """What is measured on.

    Attributes:
        bench: the float32 model, its prompt, base and options.
        rounded: the same weights in bfloat16.
        concept: the concept, whose prompts are bytes.
        prompts: the prompts of `CONCEPTS` concepts, token ids.
        kept: figures that later stages use, by name.
        made: slices and their engines, by dtype and number of concepts.
    """

    bench: Bench
    rounded: LanguageModel
    concept: Concept
    prompts: list[Tensor]
    kept: dict[str, float] = field(default_factory=dict)
    made: dict[Any, tuple[Slice, Recorded]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return self.bench.model.device

    def slice(self, model: LanguageModel, concepts: int, evaluations: int = 0) -> Slice:
        """The slice of so many concepts."""
        layers = self.bench.config.source_layer, self.bench.config.target_layer
        return Slice(model, self.prompts[:concepts], *layers, evaluations)

    def engine(self, model: LanguageModel, concepts: int) -> tuple[Slice, Recorded]:
        """The slice of so many concepts with the engine that a run of few evaluations takes; made once."""
        key = model.dtype, concepts
        if key not in self.made:
            slice = self.slice(model, concepts)
            self.made[key] = slice, Recorded(slice._value_and_grad)
        return self.made[key]

    def thetas(self, count: int, seed: int = 1) -> Tensor:
        """Random vectors of norm R, (count, d_model) float32 on the CPU."""
        draws = torch.randn(count, self.bench.model.d_model, generator=torch.Generator().manual_seed(seed))
        return normalize(draws, dim=-1) * float(self.bench.config.radius)


def self_check(model: Callable[[Lab], LanguageModel]) -> Callable[[Lab], Iterator[Check]]:
    """What every worker of a run does when it starts: slice, logits, scores and texts against plain transformers."""

    def stage(lab: Lab) -> Iterator[Check]:
        from melbo_ray.evals.self_check import selfcheck

        for name, found in selfcheck(model(lab), [lab.concept], lab.bench.config).items():
            note = f"{found['compared']} compared; {found['reason']}".removesuffix("; ")
            yield Check("self-check", f"{dtype_of(model(lab))}: {name}", found["error"], found["tolerance"], note)

    return stage


def engines(lab: Lab) -> Iterator[Check]:
    """Losses and gradients of the usual engine, for one and several concepts, against the step called plainly."""
    name = "CUDA graph" if lab.device.type == "cuda" else "recorded"
    for model, concepts in itertools.product((lab.bench.model, lab.rounded), (1, CONCEPTS)):
        yield compared(lab, *lab.engine(model, concepts), f"{dtype_of(model)}, {concepts} concepts: {name}")
    for model in (lab.bench.model, lab.rounded):
        yield _decoding(lab, model)


def compared(lab: Lab, slice: Slice, engine: Recorded, case: str) -> Check:
    """An engine of a slice's step against the step called plainly, on three draws."""
    error, told = 0.0, []
    for seed in range(3):
        inputs = step_inputs(lab, slice, seed)
        found = _told(lambda inputs=inputs: engine(*inputs), told)
        error = max(error, *map(relative, found, slice._value_and_grad(*inputs)))
    tolerance = torch.finfo(slice.model.dtype).eps ** 0.5
    return Check("engines", case, error, tolerance, "; ".join(told), bool(told))


def _told(call: Callable[[], Any], told: list[str]) -> Any:
    """What the call returns; warnings that an engine was not to be had are added to `told`."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        found = call()
    told += [str(warning.message) for warning in warned if "costs time only" in str(warning.message)]
    return found


def step_inputs(lab: Lab, slice: Slice, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """θ, z_base and rows of one step with a vector a concept, on the device."""
    count = slice.num_prompts
    rows = torch.arange(count, device=lab.device)
    theta, other = lab.thetas(2 * count, seed).to(lab.device).split(count)
    with torch.no_grad():
        return theta, slice.z(other, rows), rows


def _decoding(lab: Lab, model: LanguageModel) -> Check:
    """Logits of a recorded decoding step against the step called plainly, on the cache that texts have left."""
    told: list[str] = []
    requests = [Request(lab.prompts[0], theta, temperature=0) for theta in lab.thetas(4)]
    source = lab.bench.config.source_layer
    _told(lambda: generate(model, requests, source, max_new_tokens=4, slots=4), told)
    batch = model.kept.pop("batch")
    tokens = torch.arange(40, 44, device=lab.device)
    inputs = tokens, torch.full_like(tokens, len(lab.prompts[0])), batch.theta, batch.ablated
    ours, plain = batch.decode(*inputs)[0], batch.decode.function(*inputs)[0]
    error, tolerance = relative(ours, plain), torch.finfo(model.dtype).eps ** 0.5
    return Check("engines", f"{dtype_of(model)}: decoding", error, tolerance, "; ".join(told), bool(told))


def resumed(lab: Lab) -> Iterator[Check]:
    """Vectors of resumed chains against those of uninterrupted ones, bit for bit; several are killed unevenly."""
    config = lab.bench.config.model_copy(update=ENDLESS | {"num_vectors": 3, "max_evaluations": 6})
    for concepts in (1, 2):
        bases = {f"concept {i}": base for i, base in enumerate(lab.thetas(concepts, seed=5))}
        whole = list(chains(lab.slice(lab.bench.model, concepts), bases, config, {}, {}))
        by_name = {name: [vector for found, vector in whole if found == name] for name in bases}
        earlier = {name: vectors[: 1 + place] for place, (name, vectors) in enumerate(by_name.items())}
        again = list(chains(lab.slice(lab.bench.model, concepts), bases, config, earlier, {}))
        gaps = [(vector.theta - by_name[name][vector.index - 1].theta).abs().max() for name, vector in again]
        note = f"{len(gaps)} vectors found again, bit for bit or not at all"
        yield Check("resumed", f"chains of {concepts} concepts", float(max(gaps)), 0.0, note)


def on_the_cpu(lab: Lab) -> Iterator[Check]:
    """A tiny model on the device against its copy on the CPU: streams, logits, and losses of a chain's first vector."""
    here = random_model("least", torch.device("cpu"))
    there = LanguageModel.wrap(copy.deepcopy(here.network).to(lab.device), here.tokenizer)
    layers = {"source_layer": 1, "target_layer": 2}
    config = lab.bench.config.model_copy(update=ENDLESS | layers | {"num_vectors": 1, "radius": 3.0})
    draws = torch.randn(4, here.d_model, generator=torch.Generator().manual_seed(3))
    thetas, tokens, tolerance = 3 * normalize(draws, dim=-1), lab.prompts[0], 1e-3
    parts = [Slice(model, [tokens], config.source_layer, config.target_layer) for model in (there, here)]
    with torch.no_grad():
        streams = [part.h_target(thetas.to(part.model.device)) for part in parts]
    yield Check("device against CPU", "streams", relative(*streams), tolerance)
    logits = [
        torch.cat(list(Prompts(model, [tokens], config.source_layer).logits(thetas.to(model.device))))
        for model in (there, here)
    ]
    yield Check("device against CPU", "logits", relative(*logits), tolerance)
    first = [_first_losses(Chain(part, 0, thetas[0], config, "code")) for part in parts]
    yield Check("device against CPU", "losses of the first evaluations", relative(*first), 1e-2)


def _first_losses(chain: Chain, count: int = 5) -> Tensor:
    return torch.stack([step.losses[0].cpu() for step in itertools.islice(steps({chain: chain.solver()}), count)])


def bfloat16(lab: Lab) -> Iterator[Check]:
    """bfloat16 weights against float32 ones: z, the step's gradient, and the next token's distribution."""
    slices = [lab.slice(model, 1) for model in (lab.rounded, lab.bench.model)]
    inputs = step_inputs(lab, slices[1])
    tolerance = torch.finfo(torch.bfloat16).eps ** 0.5
    with torch.no_grad():
        yield Check("bfloat16", "z", relative(*(part.z(inputs[0]) for part in slices)), tolerance)
    found = [part._value_and_grad(*inputs) for part in slices]
    yield Check("bfloat16", "loss", relative(*(losses for losses, _ in found)), tolerance)
    yield Check("bfloat16", "gradient", relative(*(gradient for _, gradient in found)), 2 * tolerance)
    thetas = lab.thetas(8)
    log_p = [
        torch.cat(list(Prompts(model, lab.prompts[:1], lab.bench.config.source_layer).logits(thetas.to(lab.device))))
        for model in (lab.rounded, lab.bench.model)
    ]
    ours, exact = (logits.double().log_softmax(-1) for logits in log_p)
    yield Check("bfloat16", "KL(P_bfloat16‖P_float32), largest of 8, nats", float(kl(ours, exact).max()), 0.02)


def synchronisations(lab: Lab) -> Iterator[Check]:
    """How often the host waits for the device in an evaluation of a chain: once, to fetch the losses."""
    if lab.device.type != "cuda":
        return
    config = lab.bench.config.model_copy(update=ENDLESS | {"num_vectors": 1, "max_evaluations": 12})
    for concepts in (1, CONCEPTS):
        slice = lab.slice(lab.bench.model, concepts)
        found = [Chain(slice, row, base, config, f"{row}") for row, base in enumerate(lab.thetas(concepts))]
        preconditioner(slice, range(concepts), config)
        turns = steps({chain: chain.solver() for chain in found})
        # The first makes the engine.
        list(itertools.islice(turns, concepts))
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            list(itertools.islice(turns, 8 * concepts))
        torch.cuda.set_sync_debug_mode("default")
        count = sum("synchronizing" in str(warning.message) for warning in warned)
        yield Check("synchronisations", f"{concepts} concepts: host waits an evaluation of all", count / 8, 1.0)


CHECKS: dict[str, Callable[[Lab], Iterator[Check]]] = {
    "device against CPU": on_the_cpu,
    "self-check float32": self_check(lambda lab: lab.bench.model),
    "self-check bfloat16": self_check(lambda lab: lab.rounded),
    "engines": engines,
    "resumed": resumed,
    "bfloat16": bfloat16,
    "synchronisations": synchronisations,
}
