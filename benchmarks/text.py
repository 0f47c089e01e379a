"""The evaluations' benchmarks: whole ones, steered logits and steered texts (see bench.py)."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.reference import Bench, Row, timed
from melbo_ray.concepts.loader import load_concept
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.rounding import rounding_error
from melbo_ray.evals.runner import FUNCTIONS
from melbo_ray.model import packed_linear
from melbo_ray.model.hooks import steering
from melbo_ray.model.products import BFLOAT16, FLOAT32, require_products
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
    """Evaluations on the CPU with bfloat16 products (`--eval-products`), in CPU time, and the errors of their KLs."""
    if bench.model.device.type != "cpu":
        return
    require_products(BFLOAT16, bench.model.device, bench.model.dtype)
    studies = {
        products: Study(
            bench.model, bench.config.model_copy(update={"eval_products": products}), concept, "", bench.base
        )
        for concept in [load_concept("code")]
        for products in (FLOAT32, BFLOAT16)
    }
    told = rounding_error(studies[BFLOAT16])["products"]
    yield Row("rounded", "KL from the base, largest error", told["error"], "nats", note=told["reason"])
    for name, counts in {"kl": (8, 8), "generations": (8, 2), "generalization": (3, 1)}.items():
        thetas, found, seconds = _thetas(bench, counts[bench.quick]), {}, {}
        vectors = Vectors("chain", range(1, len(thetas) + 1), thetas)
        for products, study in studies.items():
            FUNCTIONS[name](study, vectors.take([0]))
            begin = time.process_time()
            found[products] = FUNCTIONS[name](study, vectors)[name]
            seconds[products] = (time.process_time() - begin) / len(thetas)
        note = f"{len(thetas)} vectors; {_compared(*found.values())}"
        for products, each in seconds.items():
            ratio = seconds[FLOAT32] / each
            yield Row("rounded", f"{name}, {products}", each, "s/vector", ratio, note=note if ratio != 1 else "")


def _compared(exact: list[dict[str, Any]], rounded: list[dict[str, Any]]) -> str:
    """How far rows with rounded products are from exact ones: the errors of KLs from the base, or other texts."""
    pairs = list(zip(exact, rounded, strict=True))
    if "text" in exact[0]:
        return f"{sum(one['text'] == other['text'] for one, other in pairs)} of {len(pairs)} texts the same"
    kls = torch.tensor([[row["kl_from_base"] for row in pair] for pair in pairs], dtype=torch.float64)
    errors = (kls[:, 0] - kls[:, 1]).abs()
    return (
        f"KL {float(kls[:, 0].median()):.2g} nats (median of {len(pairs)}), its error {float(errors.median()):.2g} "
        f"(median), {float(errors.max()):.2g} (maximum)"
    )


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


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
