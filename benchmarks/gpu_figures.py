"""The figures of gpu.py: a step against the memory limit, evaluations, whole studies, the published algorithm."""

import functools
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import chain as chain_parts
from benchmarks.gpu_checks import CONCEPTS, ENDLESS, Check, Lab, compared, step_inputs
from benchmarks.reference import Row, dtype_of, limits, now, timed
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.steering import Prompts, kl
from melbo_ray.search.chain import Chain
from melbo_ray.search.lockstep import steps
from melbo_ray.search.preconditioner import preconditioner

# The bars: a step at one concept over its limit, four concepts over one, minutes of the study below, speed-up.
BARS = {"step": 2.0, "concepts": 1.3, "study": 15.0, "equal loss": 30.0}
EVALUATIONS = ("kl", "generations", "generalization")
# The study of the bar: vectors of each of its four chains.
VECTORS = 1558
_LATE = 1024
# torch's names for how float32 products may be computed; on a CPU "high" changes nothing.
PRODUCTS = {"highest": "float32", "high": "TF32", "medium": "bfloat16 or TF32"}


def step(lab: Lab) -> Iterator[Row]:
    """A step by every engine at one and several concepts, over the least time that memory and products allow."""
    for model in (lab.bench.model, lab.rounded):
        dtype = dtype_of(model)
        best = limits(lab.device, model.dtype, lab.bench.quick)
        work, least = dict(best.work), {}
        for concepts in (1, CONCEPTS):
            slice, usual = lab.engine(model, concepts)
            inputs = step_inputs(lab, slice)
            for name, engine in {"plain": slice._value_and_grad, "usual": usual}.items():
                case = f"{dtype}, {concepts} concepts: {name}"
                work[case] = functools.partial(engine, *inputs)
                least[case] = slice, concepts
        median = timed(work, lab.bench.repeats, lab.device)
        rates = best.rates(median)
        yield Row("limits", f"{dtype}: large matrix product", rates[0] / 1e9, "GFLOP/s")
        yield Row("limits", f"{dtype}: large copy, read and write", rates[1] / 1e9, "GB/s")
        for case, (slice, concepts) in least.items():
            limit, which = best.seconds(median, slice, concepts)
            note = f"limit {limit * 1e3:.3f} ms ({which}), {concepts} × {slice.h_source.shape[1]} tokens"
            lab.kept.update({case: median[case], f"limit of {case}": limit})
            yield Row("step", case, median[case] * 1e3, "ms", None, median[case] / limit, note)
        yield from _bars(dtype, median, best, least)


def _bars(dtype: str, median: dict[str, float], best: Any, least: dict[str, Any]) -> Iterator[Row]:
    """The fastest engine of each number of concepts against the bars."""
    fastest = {
        concepts: min((case for case in least if least[case][1] == concepts), key=median.__getitem__)
        for concepts in (1, CONCEPTS)
    }
    limit, _ = best.seconds(median, least[fastest[1]][0], 1)
    for case, value, bar in (
        (f"{dtype}: one concept over its limit", median[fastest[1]] / limit, BARS["step"]),
        (f"{dtype}: {CONCEPTS} concepts over one", median[fastest[CONCEPTS]] / median[fastest[1]], BARS["concepts"]),
    ):
        yield Row("bar", case, value, "×", note=_against(value, bar))


def compiled(lab: Lab) -> Iterator[Check | Row]:
    """The compiled step, as chains of 10,000 evaluations take it: right, and how much faster; not where it is tiny."""
    if lab.bench.quick:
        return
    for model, concepts in itertools.product((lab.bench.model, lab.rounded), (1, CONCEPTS)):
        slice, usual = lab.engine(model, concepts)
        engine, dtype = Recorded(slice._value_and_grad, compiled=True), dtype_of(model)
        case, begin = f"{dtype}, {concepts} concepts: compiled", now(lab.device)
        yield compared(lab, slice, engine, case)
        first = now(lab.device) - begin
        inputs = step_inputs(lab, slice)
        work = {name: functools.partial(way, *inputs) for name, way in (("", engine), ("usual", usual))}
        median = timed(work, lab.bench.repeats, lab.device)
        limit = lab.kept.get(f"limit of {dtype}, {concepts} concepts: usual")
        note = (
            f"{median['usual'] / median['']:.2f} times as fast as the usual engine; made and checked in {first:.0f} s"
        )
        yield Row("step", case, median[""] * 1e3, "ms", None, limit and median[""] / limit, note)


def _against(value: float, bar: float, least: bool = False) -> str:
    met = value >= bar if least else value <= bar
    return f"bar: at {'least' if least else 'most'} {bar:g}: {'met' if met else 'NOT MET'}"


def evaluation(lab: Lab) -> Iterator[Row]:
    """An evaluation of a chain, solver and projections and all, over its step alone; early and late in a chain."""
    count = 8 if lab.bench.quick else 60
    config = lab.bench.config.model_copy(
        update=ENDLESS | {"num_vectors": lab.bench.model.d_model - 1, "max_evaluations": count + 8}
    )
    for concepts, late in ((1, 0), (CONCEPTS, 0), (1, min(_LATE, lab.bench.model.d_model // 2))):
        slice = lab.slice(lab.bench.model, concepts)
        found = [Chain(slice, row, base, config, f"{row}") for row, base in enumerate(lab.thetas(concepts))]
        for chain in found:
            for direction in torch.randn(late, lab.bench.model.d_model, generator=torch.Generator().manual_seed(2)):
                chain.subspace.add(direction)
        preconditioner(slice, range(concepts), config)
        turns = steps({chain: chain.solver() for chain in found})
        # The first makes the engine.
        list(itertools.islice(turns, 4 * concepts))
        begin = now(lab.device)
        list(itertools.islice(turns, count * concepts))
        seconds = (now(lab.device) - begin) / count
        case = f"{concepts} concepts, {late} vectors before"
        lab.kept[f"evaluation, {concepts}"] = lab.kept.get(f"evaluation, {concepts}", seconds)
        alone = lab.kept.get(f"float32, {concepts} concepts: usual")
        note = "" if alone is None else f"{seconds / alone:.2f} times its step alone"
        yield Row("evaluation of a chain", case, seconds * 1e3, "ms", note=note)


def evaluations(lab: Lab) -> Iterator[Row]:
    """Seconds a vector of each evaluation of the bar, in units as a study cuts them."""
    for name in EVALUATIONS:
        first, seconds, count = _evaluated(lab, name)
        lab.kept[name] = seconds
        yield Row("evaluations", name, seconds * 1e3, "ms/vector", note=f"units of {count}; the first {first:.1f} s")


def _evaluated(lab: Lab, name: str) -> tuple[float, float, int]:
    """Seconds of a first unit of this evaluation, seconds a vector of later ones, and vectors a unit."""
    from melbo_ray.evals.context import Study, Vectors

    study = Study(lab.bench.model, lab.bench.config, lab.concept, "gpu", lab.bench.base)
    count = 2 if lab.bench.quick else lab.bench.config.eval_batch
    vectors = Vectors("chain", range(1, count + 1), lab.thetas(count))
    run: Callable[..., object] = importlib.import_module(f"melbo_ray.evals.{name}").run
    times = [now(lab.device)]
    for _ in range(2 if lab.bench.quick else 4):
        run(study, vectors)
        times.append(now(lab.device))
    first, *later = (after - before for before, after in itertools.pairwise(times))
    return first, statistics.median(later) / count, count


def study(lab: Lab) -> Iterator[Row]:
    """What four chains of 1,558 vectors with these evaluations would take, from the figures above; not run."""
    names = [f"evaluation, {CONCEPTS}", *EVALUATIONS]
    if missing := [name for name in names if name not in lab.kept]:
        raise LookupError(f"needs the figure {missing[0]!r}, which is not there")
    budget = type(lab.bench.config)().max_evaluations
    chains = VECTORS * budget * lab.kept[names[0]]
    others = CONCEPTS * VECTORS * sum(lab.kept[name] for name in EVALUATIONS)
    note = (
        f"chains {chains / 60:.1f} at {budget} evaluations a vector, evaluations {others / 60:.1f}, one after the other"
    )
    minutes = (chains + others) / 60
    yield Row(
        "bar", f"{CONCEPTS} chains of {VECTORS:,}, reckoned", minutes, "min", note=_against(minutes, BARS["study"])
    )
    yield Row("study", f"{CONCEPTS} chains of {VECTORS:,}, reckoned", minutes, "min", note=note)


def equal_loss(lab: Lab) -> Iterator[Row]:
    """Time to the loss of the published algorithm's Adam steps (benchmarks/chain.py)."""
    ratios = []
    for row in chain_parts.equal_loss(lab.bench):
        if row.times_reference not in (None, 1.0):
            ratios.append(row.times_reference)
        yield row
    least = min(ratios, default=float("nan"))
    yield Row("bar", "times the published algorithm", least, "×", note=_against(least, BARS["equal loss"], least=True))


def precision(lab: Lab) -> Iterator[Row]:
    """Losses of a chain's first vectors found with bfloat16 weights and with float32 ones, judged by float32 ones."""
    config = lab.bench.config.model_copy(update=ENDLESS | {"num_vectors": 1 if lab.bench.quick else 3})
    judge = lab.slice(lab.bench.model, 1)
    for model in (lab.bench.model, lab.rounded):
        own = Chain(lab.slice(model, 1), 0, lab.bench.base, config, "code")
        thetas = []
        for _ in range(config.num_vectors):
            ends = [step.solution for step in steps({own: own.solver()}) if step.solution is not None]
            thetas += own.add(ends[-1])
        exact = Chain(judge, 0, lab.bench.base, config, "code")
        losses = [exact._losses(vector.theta)[0] / exact.unsteered_losses[0] for vector in thetas]
        note = f"as it saw itself {statistics.mean(vector.relative_loss for vector in thetas):.3f}"
        case = f"{dtype_of(model)} weights: relative loss, mean"
        yield Row("precision", case, statistics.mean(losses), "", note=note)


def products(lab: Lab) -> Iterator[Check | Row]:
    """Logits and `generalization` with TF32 or bfloat16 products of float32 weights: KL from float32 ones, and time."""
    count = 8 if lab.bench.quick else 64
    prompts = Prompts(lab.bench.model, lab.prompts[:1], lab.bench.config.source_layer)
    thetas, found, seconds, whole = lab.thetas(count).to(lab.device), {}, {}, {}
    try:
        for name in PRODUCTS:
            torch.set_float32_matmul_precision(name)
            found[name] = torch.cat(list(prompts.logits(thetas))).double().log_softmax(-1)
            begin = now(lab.device)
            list(prompts.logits(thetas))
            seconds[name] = (now(lab.device) - begin) / count
            whole[name] = _evaluated(lab, "generalization")[1]
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, what in list(PRODUCTS.items())[1:]:
        error = float(kl(found[name], found["highest"]).max().clamp(min=0))
        yield Check("products", f"{what}: KL from float32's, largest of {count}, nats", error, 0.02)
        for case, times in (("next-token logits", seconds), ("generalization", whole)):
            note = f"{times['highest'] / times[name]:.2f} times as fast as float32 products"
            yield Row("products", f"{what}: {case}", times[name] * 1e3, "ms/vector", note=note)


def memory(lab: Lab) -> Iterator[Row]:
    """The device's peak in all stages so far, and what the formula asks for an evaluator and a chain."""
    from melbo_ray.cluster.memory import demands

    found = demands(lab.bench.model, lab.bench.config, [lab.concept] * CONCEPTS)
    for role, demand in vars(found).items():
        yield Row("memory", f"asked for the {role}", demand.on_gpu / 2**30, "GiB")
    if lab.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield Row("memory", "peak of all, both models beside each other", peak, "GiB")


FIGURES: dict[str, Callable[[Lab], Iterator[Any]]] = {
    "step": step,
    "evaluation of a chain": evaluation,
    "evaluations": evaluations,
    "study": study,
    "equal loss": equal_loss,
    "precision": precision,
    "products": products,
    "memory": memory,
    "compiled": compiled,
}
