"""Geometry of the vectors: cosines with the base, the mean difference and the unembedding; summary statistics."""

import math
import statistics
from collections.abc import Sequence

import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import Chain, Row, Rows, Study, Vectors
from melbo_ray.evals.dose import measure, measure_all, unsteered_kl
from melbo_ray.evals.kl import next_token
from melbo_ray.evals.presence import contrast
from melbo_ray.search.subspace import max_abs_cos

THRESHOLDS = (0.1, 0.25, 0.5, 0.75)
_CONTRAST_DOSES = 16


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write a row of `geometry` per vector, and statistics of the whole chain into `summary` (share `summary`).

    `bessel_bound` is 1/√index, the maximum rms cosine of any direction with the first `index` vectors of an orthogonal
    chain (Bessel's inequality, Σ cos² ≤ 1).
    """
    if share == "summary":
        figures = _of_kl(study, chain) | _of_contrast(study, chain.vectors, study.once(contrast))
        figures["max_abs_cos"] = max_abs_cos(torch.cat([study.base[None], chain.vectors.theta]))
        return {"summary": [study.row("chain", 0, figure=name, value=value) for name, value in figures.items()]}
    vectors = chain.vectors.at(items)
    nearest = _unembedding(study, vectors.theta)
    cosines = {
        "cos_base": _cosines(vectors, study.base).tolist(),
        "cos_contrast": _cosines(vectors, study.once(contrast)).tolist(),
    }
    rows = []
    for place, (index, norm) in enumerate(zip(vectors.index, vectors.norms, strict=True)):
        columns = {name: values[place] for name, values in cosines.items()}
        bound = 1 / math.sqrt(index)
        rows.append(study.row("chain", index, norm=norm, **columns, **nearest[place], bessel_bound=bound))
    return {"geometry": rows}


def _cosines(vectors: Vectors, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " n"]:
    return normalize(vectors.theta, dim=-1) @ normalize(direction, dim=-1)


def _unembedding(study: Study, thetas: Float[Tensor, "n d_model"]) -> list[Row]:
    """For each vector, the unembedding row with the largest |cos|."""
    weight = study.model.network.get_output_embeddings().weight
    units, rows = normalize(weight.float(), dim=-1), []
    for part in thetas.split(64):
        cosines = normalize(part, dim=-1).to(units) @ units.T
        values, tokens = cosines.abs().max(-1)
        names = [study.model.tokenizer.decode([token]) for token in tokens.tolist()]
        rows += [
            {"max_abs_cos_unembedding": value, "nearest_token": name}
            for value, name in zip(values.tolist(), names, strict=True)
        ]
    return rows


def _kls(study: Study, chain: Chain) -> list[float]:
    """KL(P‖P_base) of each vector at its own norm: as the run has stored it, and computed where it has not."""
    rows = chain.stored("kl").filter((pc.field("kind") == "chain") & (pc.field("scale") == "own"))
    known = dict(zip(rows["index"].to_pylist(), rows["kl_from_base"].to_pylist(), strict=True))
    lacking = chain.vectors.at([index for index in chain.vectors.index if index not in known])
    computed = next_token(study, lacking.theta) if len(lacking) else []
    known |= {index: row["kl_from_base"] for index, row in zip(lacking.index, computed, strict=True)}
    return [known[index] for index in chain.vectors.index]


def _of_kl(study: Study, chain: Chain) -> dict[str, float | None]:
    """The number of vectors below each share of the unsteered KL(P‖P_base), and the change point of the curve."""
    kls = _kls(study, chain)
    whole = unsteered_kl(study)
    figures: dict[str, float | None] = {"unsteered_kl": whole, "median_kl": statistics.median(kls)}
    for share in THRESHOLDS:
        figures[f"vectors_below_{share:g}_unsteered_kl"] = float(sum(kl < share * whole for kl in kls))
    place = change_point(kls)
    figures["change_point"] = None if place is None else float(chain.vectors.index[place])
    figures["mean_kl_before_change"] = None if place is None else sum(kls[:place]) / place
    figures["mean_kl_after_change"] = None if place is None else sum(kls[place:]) / (len(kls) - place)
    return figures


def change_point(values: list[float]) -> int | None:
    """The start of the second piece in the least-squares fit of two constant pieces; None for fewer than 4 values."""
    if len(values) < 4:
        return None
    series = torch.tensor(values, dtype=torch.float64)
    errors = [
        float(((part - part.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum())
        for part, rest in ((series[:cut], series[cut:]) for cut in range(1, len(series)))
    ]
    return 1 + errors.index(min(errors))


def _of_contrast(study: Study, vectors: Vectors, direction: Tensor) -> dict[str, float | None]:
    """Bessel's bound, and the smallest dose of the mean-difference direction with half of the base's effect.

    `bessel_rms_component` is max ‖θ‖ / √n, an upper bound of any direction's rms component along the vectors
    (√(Σ (θ·d)²/n) ≤ max ‖θ‖ · √(Σ cos²/n)). `contrast_norm_for_half_score` is the smallest of 16 norms up to 2R at
    which the direction's concept score is half of the base's, `contrast_norm_for_half_kl` that at which KL(P‖P_base) is
    half of the unsteered one; both are null if no norm suffices.
    """
    radius = study.radius
    doses = [("contrast", 2 * radius * step / _CONTRAST_DOSES) for step in range(1, _CONTRAST_DOSES + 1)]
    curve = measure(study, direction, doses)
    score, half = measure_all(study, study.base[None])[0]["concept_score"] / 2, unsteered_kl(study) / 2
    return {
        "bessel_rms_cos": 1 / math.sqrt(len(vectors)),
        "bessel_rms_component": max(vectors.norms) / math.sqrt(len(vectors)),
        "rms_cos_contrast": float(_cosines(vectors, direction).square().mean().sqrt()),
        "contrast_norm_for_half_score": next((row["norm"] for row in curve if row["concept_score"] >= score > 0), None),
        "contrast_norm_for_half_kl": next((row["norm"] for row in curve if row["kl_from_base"] <= half), None),
    }
