"""Whether the directions are present where the unsteered model writes and reads the concept.

The post's own test of its hypothesis of adversarial vectors: a direction that stands for the concept in the model's own
thinking should stand out in the source layer on concept texts; one that merely drives later layers should not.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts
from melbo_ray.search import base_vectors
from melbo_ray.seeds import derive_seed

_WRITTEN_PROMPTS, _WRITTEN_LENGTH = 8, 32
# Sinks have norms several times the others' (SmolLM2 at layer 8: 632 against about 120).
_SINK_FACTOR = 3.0


@dataclass(frozen=True)
class TextSet:
    """The source layer's residual stream over some texts, unsteered.

    Attributes:
        h: (tokens, d_model) float32.
        sink: which tokens carry massive activations: norm above 3 times the set's median.
    """

    h: Float[Tensor, "tokens d_model"]
    sink: Tensor

    def activations(self, sinks: str) -> Float[Tensor, "tokens d_model"]:
        """All of them (`kept`), or those that are not sinks (`dropped`)."""
        return self.h if sinks == "kept" else self.h[~self.sink]


def run(study: Study, vectors: Vectors) -> Rows:
    """The projection on each direction over concept texts against neutral texts; sinks kept, and dropped.

    `texts` is what was read (`concept`, `neutral`: the passages that ship) or what the unsteered model itself writes on
    the same held-out prompts (`written_concept`: how it goes on after one of the concept's continuations was forced;
    `written_neutral`: its own answer); prompts and forced tokens are not counted. Random directions miss chance, too,
    by as much as the sets differ along them: `query.EXAMPLES["presence_p_values"]` ranks a vector among those that
    `control` draws. Projections are on the unit direction (residual-stream units), `mean_cos` is of single tokens.
    `effect_size` (Cohen's d, pooled) and `auroc` set a concept set against its neutral counterpart, and are null on
    neutral rows.
    """
    vectors = vectors.take([i for i, norm in enumerate(vectors.norms) if norm > 0])
    if not len(vectors):
        return {"presence": []}
    units = torch.nn.functional.normalize(vectors.theta, dim=-1)
    rows = []
    for name, sets in study.once(text_sets).items():
        for sinks in ("kept", "dropped"):
            concept, neutral = (part.activations(sinks) for part in sets)
            for columns, index in zip(_compare(concept, neutral, units), vectors.index, strict=True):
                rows += [
                    study.row(vectors.kind, index, texts=f"{name}{texts}", sinks=sinks, **columns[texts])
                    for texts in ("concept", "neutral")
                ]
    return {"presence": rows}


def _compare(concept: Tensor, neutral: Tensor, units: Float[Tensor, "n d_model"]) -> list[dict[str, Row]]:
    projections = {"concept": concept @ units.T, "neutral": neutral @ units.T}
    cosines = {"concept": _cosines(concept, units), "neutral": _cosines(neutral, units)}
    sizes, aurocs = effect_size(*projections.values()).tolist(), auroc(*projections.values()).tolist()
    return [
        {
            texts: {
                "mean_projection": float(projection[:, i].mean()),
                "max_projection": float(projection[:, i].max()),
                "mean_cos": float(cosines[texts][i]),
                "effect_size": sizes[i] if texts == "concept" else None,
                "auroc": aurocs[i] if texts == "concept" else None,
                "num_tokens": len(projection),
            }
            for texts, projection in projections.items()
        }
        for i in range(len(units))
    ]


def _cosines(h: Tensor, units: Tensor) -> Tensor:
    return (torch.nn.functional.normalize(h, dim=-1) @ units.T).mean(0)


def effect_size(a: Float[Tensor, "m n"], b: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """Cohen's d of each column: (mean a − mean b) over the pooled standard deviation."""
    pooled = (a.var(0) * (len(a) - 1) + b.var(0) * (len(b) - 1)) / (len(a) + len(b) - 2)
    return (a.mean(0) - b.mean(0)) / pooled.sqrt()


def auroc(a: Float[Tensor, "m n"], b: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """The chance that a value of `a` lies above one of `b`, ties counting half, for each column."""
    a, ordered = a.T.contiguous(), b.T.contiguous().sort(dim=-1).values
    below = torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)
    return below.float().mean(-1) / (2 * len(b))


def contrast(study: Study) -> Float[Tensor, " d_model"]:
    """The mean-difference direction: `base_vectors.contrast`, of prompts: the texts it is judged on are new.

    Of a concept without contrast prompts: mean activation on its texts minus that on neutral ones, sinks dropped.
    """
    if study.concept.contrast:
        return base_vectors.contrast(study.model, study.concept, study.config.source_layer, study.config.system_prompt)
    concept, neutral = next(iter(study.once(text_sets).values()))
    return concept.activations("dropped").mean(0) - neutral.activations("dropped").mean(0)


def text_sets(study: Study) -> dict[str, tuple[TextSet, TextSet]]:
    """(concept, neutral), by what precedes their names in `texts`: nothing for those read, `written_`."""
    sets = {}
    if study.concept.texts and study.concept.neutral_texts:
        sets[""] = _read(study, study.concept.texts), _read(study, study.concept.neutral_texts)
    sets["written_"] = _written(study)
    return sets


def _read(study: Study, texts: list[str]) -> TextSet:
    tokens = [study.model.tokenizer(text, return_tensors="pt")["input_ids"][0].long() for text in texts]
    return _text_set(study, [(ids, 0) for ids in tokens])


def _written(study: Study) -> tuple[TextSet, TextSet]:
    """What the unsteered model writes on the same prompts: after a forced opening of the concept, and by itself."""
    prompts = [study.tokens(name) for name in list(study.concept.held_out)[:_WRITTEN_PROMPTS]]
    forced = itertools.cycle(study.continuations)
    opened = [torch.cat([prompt, next(forced)]) for prompt in prompts]
    return _write(study, opened, "concept"), _write(study, prompts, "neutral")


def _write(study: Study, starts: list[Tensor], purpose: str) -> TextSet:
    zero, config = torch.zeros_like(study.base), study.config
    seeds = [derive_seed(config.seed, study.concept.name, i, f"presence/{purpose}") for i in range(len(starts))]
    requests = [Request(start, zero, seed) for start, seed in zip(starts, seeds, strict=True)]
    texts = generate(study.model, requests, config.source_layer, max_new_tokens=_WRITTEN_LENGTH)
    # Where it writes nothing, its end token is what it wrote.
    written = [torch.tensor(text.tokens or study.model.end_tokens[:1]) for text in texts]
    return _text_set(study, [(torch.cat(parts), len(parts[0])) for parts in zip(starts, written, strict=True)])


def _text_set(study: Study, texts: list[tuple[Tensor, int]]) -> TextSet:
    """Activations of each text from the given position on."""
    stream = Prompts(study.model, [tokens for tokens, _ in texts], study.config.source_layer).h_source
    h = torch.cat([row[start : len(tokens)] for row, (tokens, start) in zip(stream, texts, strict=True)]).float().cpu()
    norms = h.norm(dim=-1)
    return TextSet(h, norms > _SINK_FACTOR * norms.median())
