"""The evaluations' benchmarks: whole ones, steered logits and steered texts (see bench.py)."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.reference import Bench, Row, timed
from melbo_ray.concepts.loader import load_concept
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.runner import FUNCTIONS
from melbo_ray.model import packed_linear
from melbo_ray.model.hooks import steering
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts


def texts(bench: Bench) -> Iterator[Row]:
    """Greedy texts under a vector each: ours, against transformers' `generate` with a hook, one by one and batched."""
    model, source = bench.model, bench.config.source_layer
    count, length = (4, 8) if bench.quick else (16, 32)
    thetas, found = _thetas(bench, count), {}
    tokens = bench.tokens.to(model.device)

    write: Any = model.network.generate

    def theirs(vectors: Tensor) -> list[list[int]]:
        with steering(model, source, vectors.to(model.device)):
            written = write(
                tokens.expand(len(vectors), -1),
                attention_mask=torch.ones(len(vectors), len(tokens), dtype=torch.long, device=model.device),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=(model.end_tokens or [0])[0],
            )
        return [_until_end(row, model.end_tokens) for row in written[:, len(tokens) :].tolist()]

    def ours() -> list[list[int]]:
        requests = [Request(bench.tokens, theta, temperature=0) for theta in thetas]
        return [text.tokens for text in generate(model, requests, source, max_new_tokens=length, slots=count)]

    work = {
        "transformers, one at a time": lambda: [text for theta in thetas for text in theirs(theta[None])],
        "transformers, one batch": lambda: theirs(thetas),
        f"ours, batch {count}": ours,
    }
    kept = {name: lambda name=name, run=run: found.update({name: run()}) for name, run in work.items()}
    median = timed(kept, 1 if bench.quick else 3, model.device)
    alone = next(iter(work))
    for name, seconds in median.items():
        same = sum(map(list.__eq__, found[name], found[alone]))
        written = sum(map(len, found[name]))
        note = f"{written / seconds:.0f} tokens/s; {same} of {count} texts the same token for token"
        yield Row("texts", name, count / seconds, "vectors/s", median[alone] / seconds, None, note)


def logits(bench: Bench) -> Iterator[Row]:
    """Next-token logits under a vector each, against a hooked pass of the whole model for each vector."""
    model, source = bench.model, bench.config.source_layer
    count = 4 if bench.quick else 32
    thetas, tokens = _thetas(bench, count).to(model.device), bench.tokens[None].to(model.device)
    prompts = Prompts(model, [bench.tokens], source)

    @torch.no_grad()
    def theirs() -> None:
        for theta in thetas:
            with steering(model, source, theta[None]):
                model.network(input_ids=tokens, use_cache=False, logits_to_keep=1)

    work = {"transformers, one at a time": theirs, f"ours, batch {count}": lambda: list(prompts.logits(thetas))}
    median = timed(work, max(2, bench.repeats // 3), model.device)
    for name, seconds in median.items():
        yield Row("logits", name, count / seconds, "vectors/s", median["transformers, one at a time"] / seconds)


def evaluations(bench: Bench) -> Iterator[Row]:
    """A vector's evaluations, against the same with torch's own products and every prompt read from its start."""
    study = Study(bench.model, bench.config, load_concept("code"), "bench", bench.base)
    vectors = Vectors("chain", [1], _thetas(bench, 1))
    for name in ("kl", "dose", "generalization", "generations"):

        def ours(name: str = name) -> None:
            FUNCTIONS[name](study, vectors)

        def plainly(ours: Callable[[], None] = ours) -> None:
            with _plain(bench):
                ours()

        ours()
        work = {f"{name}, plainly": plainly, f"{name}, ours": ours}
        median = timed(work, 1 if bench.quick else 5, bench.model.device)
        for case, seconds in median.items():
            yield Row("evaluations", case, seconds, "s/vector", median[f"{name}, plainly"] / seconds)


def rounded(bench: Bench) -> Iterator[Row]:
    """Next-token logits on the CPU with bfloat16 products and float32 sums, and the error of KL from the base's."""
    if bench.model.device.type != "cpu":
        return
    count = 4 if bench.quick else 24
    prompts = Prompts(bench.model, [bench.tokens], bench.config.source_layer)
    thetas, found = torch.cat([bench.base[None], _thetas(bench, count)]), {}
    multiply: Any = packed_linear._packed
    weights: dict[Tensor, Tensor] = {}

    def halved(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        if weight not in weights:
            weights[weight] = weight.bfloat16()
        product = multiply(x.bfloat16(), weights[weight], None, *how).float()
        return product if bias is None else product + bias

    def run(name: str, product: Any) -> None:
        with mock.patch.object(packed_linear, "_packed", product):
            found[name] = torch.stack([part[-1] for part in prompts.logits(thetas)]).double().log_softmax(-1)

    names = {"float32 products": multiply, "bfloat16 products": halved}
    work = {name: lambda name=name, product=product: run(name, product) for name, product in names.items()}
    median = timed(work, max(2, bench.repeats // 3), bench.model.device)
    exact, rough = (_kl(logs[1:], logs[0]) for logs in found.values())
    error, between = (rough - exact).abs(), _kl(*found.values())
    note = (
        f"KL from the base {float(exact.median()):.2g} nats (median), its error {float(error.median()):.2g} "
        f"(median), {float(error.max()):.2g} (maximum); KL between both at most {float(between.max()):.2g}"
    )
    for name, seconds in median.items():
        ratio = median["float32 products"] / seconds
        yield Row("rounded", name, len(thetas) / seconds, "vectors/s", ratio, note=note if name.startswith("b") else "")


@contextlib.contextmanager
def _plain(bench: Bench) -> Generator[None]:
    # As where this model had been found not to share what its prompts begin with.
    forgone = {f"prefix after layer {bench.config.source_layer}": 0}
    with mock.patch.dict(bench.model.kept, forgone), mock.patch.object(packed_linear, "_packed", None):
        yield


def _thetas(bench: Bench, count: int) -> Tensor:
    """Vectors near the base: directions that the model answers to, each its own."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, bench.model.d_model, generator=generator)
    return normalize(normalize(bench.base, dim=-1) + 0.5 * normalize(noise, dim=-1), dim=-1) * float(
        bench.config.radius
    )


def _kl(of: Tensor, beside: Tensor) -> Tensor:
    return (of.exp() * (of - beside)).sum(-1)


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
