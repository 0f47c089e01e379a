"""Mediation: the share of a vector's effect that passes through the direction in which displacements agree.

At a layer ℓ the displacement h(θ) − h(0) loses its components in a subspace of few dimensions, at every position; the
rest of the model runs on (activation patching towards the unsteered run, restricted to a subspace: Geiger et al. 2024,
"Finding alignments between interpretable causal variables and distributed neural representations").
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.generalization import LENGTH
from melbo_ray.evals.kl import divergences
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import target_log_probs
from melbo_ray.model.streams import Streams

RANKS = (1, 4)

Subspaces = dict[tuple[str, int], Float[Tensor, "rank d_model"]]
"""Orthonormal rows of each subspace at a layer, by name and rank."""


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `mediation`: a row for each layer and each subspace projected out of the displacement there.

    `subspace`: `none`; `base`, the leading `rank` directions of the base's displacements over the prompt's positions
    from `z_from` on (right singular vectors, uncentred); `last`, the direction of the base's displacement at the
    prompt's last token, where displacements agree (`convergence`). Both are the same for every vector, and taken from
    the base alone. Nulls of a vector of the chain: `other` and `other_last`, the same of a random direction of its
    index and norm (`with_null`). Layers: half of the way to the target, the target, and half of the way from there to
    the end.

    Effects: KL from base and unsteered of the next token; `agreement`, the share of the base's greedy continuation (16
    tokens) that stays the likeliest, forced; `concept_score` of the concept's first continuation, nats per token. The
    share of the effect lost is (KL − KL_none) / (KL_unsteered − KL_none).
    """
    found, *null = with_null(study, vectors)
    others = null[0].theta if null else [None] * len(found)
    rows = []
    for index, theta, other in zip(found.index, found.theta, others, strict=True):
        rows += _of_vector(study, found.kind, index, theta, other)
    return {"mediation": rows}


def layers_of(study: Study) -> list[int]:
    """The layers at which is projected; all above the source."""
    source, target, last = study.config.source_layer, study.config.target_layer, len(study.model.layers) - 1
    return sorted({(source + 1 + target) // 2, target, (target + last) // 2})


class Forced:
    """The training prompt with the base's own greedy continuation, and with the concept's first one.

    Attributes:
        streams: the streams of both texts.
        where: rows and positions whose logits predict the continuations; the first predicts the next token.
        targets: the tokens predicted.
        own: number of tokens in the base's continuation.
        prompt: number of tokens in the prompt.
        unsteered: the unsteered streams of `layers_of`.
        unsteered_log_probs: unsteered log-probability of each target.
        likeliest: the likeliest token under the base at each place of its continuation.
    """

    def __init__(self, study: Study) -> None:
        prompt, source = study.tokens(TRAINING), study.config.source_layer
        (text,) = generate(study.model, [Request(prompt, study.base, temperature=0)], source, max_new_tokens=LENGTH)
        own = torch.tensor(text.tokens or study.model.end_tokens[:1])
        forced = [own, study.continuations[0]]
        texts = [torch.cat([prompt, branch[:-1]]) for branch in forced]
        self.streams = Streams(study.model, texts, source, study.prompt.way == "whole")
        self.own, self.prompt, self.targets = len(own), len(prompt), torch.cat(forced)
        places = [torch.arange(len(branch)) + len(prompt) - 1 for branch in forced]
        rows = [torch.full_like(place, row) for row, place in enumerate(places)]
        self.where: tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]] = (torch.cat(rows), torch.cat(places))
        self.unsteered = self.streams.under(torch.zeros_like(study.base), layers_of(study))
        last = layers_of(study)[-1]
        base = self.streams.under(study.base, [last])
        (plain, steered) = self.streams.logits(last, torch.stack([self.unsteered[-1], base[0]]), self.where)
        self.unsteered_log_probs = target_log_probs(plain, self.targets)
        self.likeliest = steered[: self.own].argmax(-1)


def subspaces(study: Study, theta: Float[Tensor, " d_model"], leading: str, last: str) -> list[Subspaces]:
    """For each layer of `layers_of` the subspaces that a vector's displacement has, under these two names."""
    forced = study.once(Forced)
    moved = (forced.streams.under(theta, layers_of(study)) - forced.unsteered)[:, 0, : forced.prompt].double()
    found = []
    for h in moved:
        directions = torch.linalg.svd(h[study.config.z_from :], full_matrices=False).Vh
        found.append({(leading, rank): directions[:rank].float() for rank in RANKS})
        found[-1][last, 1] = normalize(h[-1:], dim=-1).float()
    return found


def of_base(study: Study) -> list[Subspaces]:
    """The base's subspaces."""
    return subspaces(study, study.base, "base", "last")


def _of_vector(
    study: Study, kind: str, index: int, theta: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"] | None
) -> list[Row]:
    forced, rows = study.once(Forced), []
    steered = forced.streams.under(theta, layers_of(study))
    nulls = [{}] * len(steered) if other is None else subspaces(study, other, "other", "other_last")
    for place, (layer, named, null) in enumerate(zip(layers_of(study), study.once(of_base), nulls, strict=True)):
        h = steered[place]
        change = h - forced.unsteered[place]
        variants = {("none", 0): h} | {key: h - (change @ units.T) @ units for key, units in (named | null).items()}
        logits = forced.streams.logits(layer, torch.stack([*variants.values()]), forced.where)
        for (subspace, rank), scores in zip(variants, logits, strict=True):
            keys = {"layer": layer, "subspace": subspace, "rank": rank, "norm": float(theta.norm())}
            rows.append(study.row(kind, index, **keys, **_effects(study, forced, scores)))
    return rows


def _effects(study: Study, forced: Forced, logits: Float[Tensor, "kept vocab"]) -> Row:
    found = divergences(study, logits[0].double().log_softmax(-1).to(study.base_log_probs.device))
    gain = target_log_probs(logits, forced.targets) - forced.unsteered_log_probs
    return {
        "kl_from_base": found["kl_from_base"],
        "kl_from_unsteered": found["kl_from_unsteered"],
        "agreement": float((logits[: forced.own].argmax(-1) == forced.likeliest).float().mean()),
        "concept_score": float(gain[forced.own :].mean()),
    }
