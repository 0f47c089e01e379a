"""Presence of the directions in the unsteered model's activations on texts of the concept.

This is the post's test of its hypothesis of adversarial vectors: a direction that represents the concept in the model
should have a larger projection at the source layer on concept texts; one that only drives later layers should not.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts
from melbo_ray.search.contrast import contrast as mean_difference
from melbo_ray.seeds import derive_seed

_WRITTEN_PROMPTS, _WRITTEN_LENGTH = 8, 32
# The norms of sinks are several times those of other tokens (SmolLM2 at layer 8: 632 against about 120).
_SINK_FACTOR = 3.0


@dataclass(frozen=True)
class TextSet:
    """The unsteered residual stream after the source layer on a set of texts.

    Attributes:
        h: the activations, (tokens, d_model) float32.
        sink: mask of attention sinks, whose norm is above 3 times the set's median.
    """

    h: Float[Tensor, "tokens d_model"]
    sink: Tensor

    def activations(self, sinks: str) -> Float[Tensor, "tokens d_model"]:
        """All activations (`kept`), or those without sinks (`dropped`)."""
        return self.h if sinks == "kept" else self.h[~self.sink]


def run(study: Study, vectors: Vectors) -> Rows:
    """Compare the projections on each direction between concept and neutral texts, with sinks kept and dropped.

    `texts` names the set: the packaged passages (`concept`, `neutral`), or texts of the unsteered model on the same
    held-out prompts (`written_concept`, after a forced continuation of the concept; `written_neutral`, its own answer),
    without prompts and forced tokens. Projections are on the unit direction (residual-stream units); `mean_cos` is the
    mean over tokens. `effect_size` (Cohen's d, pooled) and `auroc` compare a concept set with its neutral counterpart
    and are null on neutral rows. Random directions deviate from chance too, as the sets differ along them:
    `queries.EXAMPLES["presence_p_values"]` ranks a vector among the random directions of `control`.
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
    """The probability that a value of `a` exceeds a value of `b`, with ties counted half, for each column."""
    a, ordered = a.T.contiguous(), b.T.contiguous().sort(dim=-1).values
    below = torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)
    return below.float().mean(-1) / (2 * len(b))


def contrast(study: Study) -> Float[Tensor, " d_model"]:
    """The mean-difference direction: that of the concept's prompts, which are disjoint from the evaluated texts.

    For a concept without contrast prompts it is the mean activation on its texts minus that on the neutral texts,
    without sinks.
    """
    if study.concept.contrast:
        config = study.config
        return mean_difference(study.model, study.concept, config.source_layer, config.system_prompt)[0]
    concept, neutral = next(iter(study.once(text_sets).values()))
    return concept.activations("dropped").mean(0) - neutral.activations("dropped").mean(0)


def text_sets(study: Study) -> dict[str, tuple[TextSet, TextSet]]:
    """The pairs (concept, neutral) of text sets by their prefix in the column `texts`: empty, or `written_`."""
    sets = {}
    if study.concept.texts and study.concept.neutral_texts:
        sets[""] = _read(study, study.concept.texts), _read(study, study.concept.neutral_texts)
    sets["written_"] = _written(study)
    return sets


def _read(study: Study, texts: list[str]) -> TextSet:
    tokens = [study.model.tokenizer(text, return_tensors="pt")["input_ids"][0].long() for text in texts]
    return _text_set(study, [(ids, 0) for ids in tokens])


def _written(study: Study) -> tuple[TextSet, TextSet]:
    """The unsteered model's texts on the same prompts: after a forced continuation of the concept, and on its own."""
    prompts = [study.tokens(name) for name in list(study.concept.held_out)[:_WRITTEN_PROMPTS]]
    forced = itertools.cycle(study.continuations)
    opened = [torch.cat([prompt, next(forced)]) for prompt in prompts]
    return _write(study, opened, "concept"), _write(study, prompts, "neutral")


def _write(study: Study, starts: list[Tensor], purpose: str) -> TextSet:
    zero, config = torch.zeros_like(study.base), study.config
    seeds = [derive_seed(config.seed, study.concept.name, i, f"presence/{purpose}") for i in range(len(starts))]
    requests = [Request(start, zero, seed) for start, seed in zip(starts, seeds, strict=True)]
    texts = generate(study.model, requests, config.source_layer, max_new_tokens=_WRITTEN_LENGTH)
    # An empty text is represented by its end token.
    written = [torch.tensor(text.tokens or study.model.end_tokens[:1]) for text in texts]
    return _text_set(study, [(torch.cat(parts), len(parts[0])) for parts in zip(starts, written, strict=True)])


def _text_set(study: Study, texts: list[tuple[Tensor, int]]) -> TextSet:
    """The activations of each text from the given position on."""
    stream = Prompts(study.model, [tokens for tokens, _ in texts], study.config.source_layer).h_source
    h = torch.cat([row[start : len(tokens)] for row, (tokens, start) in zip(stream, texts, strict=True)]).float().cpu()
    norms = h.norm(dim=-1)
    return TextSet(h, norms > _SINK_FACTOR * norms.median())
