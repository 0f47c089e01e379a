"""How a step grows with concepts, prompt length, d_model and the chain (see bench.py)."""

import copy
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.chain import stepper
from benchmarks.reference import Bench, Row, limits, timed
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts
from melbo_ray.search.chain import chain
from melbo_ray.search.subspace import Subspace

_BLOCKS = 8


def growth(bench: Bench) -> Iterator[Row]:
    """How a step grows with concepts, prompt length and d_model, and what the projection costs late in a chain."""
    device, config = bench.model.device, bench.config
    generator = torch.Generator().manual_seed(0)
    theta, z = torch.randn(2, 4, bench.model.d_model, generator=generator)
    lengths = (8, 32) if bench.quick else (8, 16, 32, 64, 128)
    slices = {f"{count} concepts": bench.slice(*[bench.tokens] * count) for count in (1, 2, 4)}
    slices |= {f"{length} tokens": bench.slice(torch.arange(10, 10 + length)) for length in lengths}
    best = limits(device, bench.model.dtype)
    rows = {case: slice.num_prompts for case, slice in slices.items()}
    work = {case: stepper(slice, config, theta[: rows[case]], z[: rows[case]]) for case, slice in slices.items()}
    median = timed(best.work | work, bench.repeats, device)
    for case, slice in slices.items():
        first = median["1 concepts" if "concepts" in case else f"{lengths[0]} tokens"]
        ratio = median[case] / best.seconds(median, slice, rows[case])[0]
        note = f"{median[case] / first:.2f} times the first"
        yield Row("growth", case, median[case] * 1e3, "ms", None, ratio, note)
    for d_model in (256, 576) if bench.quick else (576, 1024, 2048):
        yield from _width(bench, d_model, generator)


def _width(bench: Bench, d_model: int, generator: torch.Generator) -> Iterator[Row]:
    """A step of eight blocks (two are measured) at this width, and the projection against 2000 vectors or d_model."""
    device, measured = bench.model.device, 2
    shape = LlamaConfig(
        vocab_size=256, hidden_size=d_model, intermediate_size=d_model * 8 // 3 // 64 * 64,
        num_hidden_layers=measured + 1, num_attention_heads=d_model // 64, num_key_value_heads=d_model // 64,
    )  # fmt: skip
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(shape, dtype=bench.model.dtype)
    slice = Slice(LanguageModel.wrap(network, bench.model.tokenizer), [torch.arange(37)], 0, measured)
    count = min(2000, d_model - 1)
    taken = Subspace(d_model, count, device)
    taken._basis.copy_(torch.linalg.qr(torch.randn(d_model, count, generator=generator))[0].T)
    taken.size = count
    theta, z = torch.randn(2, 1, d_model, generator=generator)
    # An evaluation of L-BFGS projects twice: its gradient, and its direction.
    projections = lambda: [taken.remove(theta) for _ in range(2)]  # noqa: E731
    work = {"step": stepper(slice, bench.config, theta, z), "projections": projections}
    median = timed(work, bench.repeats, device)
    step = median["step"] * _BLOCKS / measured
    yield Row("growth", f"d_model {d_model}, {_BLOCKS} blocks, 37 tokens", step * 1e3, "ms", note="random weights")
    share = f"{median['projections'] / step:.1%} of that step"
    case = f"d_model {d_model}: both projections, n = {count}"
    yield Row("growth", case, median["projections"] * 1e3, "ms", note=share)


def precision(bench: Bench) -> Iterator[Row]:
    """Vectors found with bfloat16 weights beside those found with float32 ones, both judged by float32 weights."""
    network = copy.deepcopy(bench.model.network)
    models = {
        name: LanguageModel.wrap(copy.deepcopy(network).to(dtype), bench.model.tokenizer)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    config = bench.config.model_copy(update={"num_vectors": 1 if bench.quick else 4})
    layers = config.source_layer, config.target_layer
    judge = Slice(models["float32"], [bench.tokens], *layers)
    prompts = Prompts(models["float32"], [bench.tokens], config.source_layer)
    for name, model in models.items():
        found = list(chain(Slice(model, [bench.tokens], *layers), bench.base, config))
        thetas = torch.stack([torch.zeros_like(bench.base), bench.base, *(v.theta for v in found)]).to(model.device)
        with torch.no_grad():
            z = judge.z(thetas)
            last = torch.stack([logits[-1] for logits in prompts.logits(thetas)]).log_softmax(-1)
        losses = (z[2:] - z[1]).norm(dim=-1) / (z[0] - z[1]).norm()
        kl = (last[2:].exp() * (last[2:] - last[1])).sum(-1)
        said = float(sum(v.relative_loss for v in found)) / len(found)
        norm = sum(v.norm for v in found) / len(found)
        note = f"as it saw itself {said:.3f}, norm {norm:.1f}, KL from the base {float(kl.mean()):.3f}"
        yield Row("precision", f"{name} weights: relative loss, mean", float(losses.mean()), "", note=note)
