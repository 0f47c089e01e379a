"""The Arrow schema of every table of a run.

A table is a folder of Parquet parts, hive-partitioned by concept: `<run>/<table>/concept=<name>/part-….parquet`. Every
row has the keys `run_id`, `kind` and `index`; the concept is the partition. Users' queries depend on these columns, so
a change requires a new SCHEMA_VERSION.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import pyarrow as pa

SCHEMA_VERSION = 2
SINK = 0.3
"""Threshold of `sink_share` for a warning: above it one position's activation is a large part of the post's loss."""

_KEYS = [pa.field("run_id", pa.string()), pa.field("kind", pa.string()), pa.field("index", pa.int32())]


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([*_KEYS, *(pa.field(name, dtype) for name, dtype in columns.items())])


_text, _float, _double, _int, _bool = pa.string(), pa.float32(), pa.float64(), pa.int32(), pa.bool_()
_KL = {"kl_from_base": _float, "kl_to_base": _float, "kl_from_unsteered": _float}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The search and the fit of a vector: columns of `vectors`, with their types.

    Attributes:
        norm: ‖θ‖ (residual-stream units).
        loss: ‖z(θ) − z(θ₀)‖ without the norm penalty (residual-stream units).
        relative_loss: loss / ‖z(0) − z(θ₀)‖.
        relative_loss_from_0: relative loss with z over all positions, as in the post.
        relative_loss_from_1: relative loss with z over all positions except the first; null for a single position.
        evaluations: number of loss-and-gradient evaluations; those of the whole block for a vector of a block.
        stop_reason: why the solver stopped: `converged`, `max_evaluations`, `line_search`; or `imported`.
        max_abs_cos: largest |cos| with θ₀, what the chain avoids, and all earlier vectors, float64.
        seconds: wall time, seconds; an equal share for each vector of a block.
        seed: seed of the random start.
    """

    norm: Annotated[float, _float]
    loss: Annotated[float, _float]
    relative_loss: Annotated[float, _float]
    relative_loss_from_0: Annotated[float, _float]
    relative_loss_from_1: Annotated[float | None, _float]
    evaluations: Annotated[int, _int]
    stop_reason: Annotated[str, _text]
    max_abs_cos: Annotated[float, _double]
    seconds: Annotated[float, _float]
    seed: Annotated[int, pa.int64()]


_CERTIFICATE = {name: hint.__metadata__[0] for name, hint in get_type_hints(Certificate, include_extras=True).items()}

SCHEMAS: dict[str, pa.Schema] = {
    "vectors": _schema(vector=pa.list_(_float), **_CERTIFICATE),
    "radius": _schema(radius=_float, nonlinearity=_float),
    "candidates": _schema(
        vector=pa.list_(_float), steps=_int, objective=_float, radius=_float, concept_score=_float, text=_text,
        unsteered_kl=_float, weaker_text=_text, firm=_bool, detected=_bool, coherence=_float, distinct_trigrams=_float,
        held_out_texts=pa.list_(_text), held_out_gained=_int, rank=_int, taken=_bool, reason=_text,
    ),
    "kl": _schema(
        prompt_id=_text, scale=_text, norm=_float, **_KL, top_tokens=pa.list_(_text), top_probs=pa.list_(_float),
        top1_agrees=_bool,
    ),
    "generalization": _schema(
        prompt_id=_text, norm=_float, kl_from_base=_float, kl_per_token=_float, top1_agreement=_float,
        log_likelihood_ratio=_float, concept_score=_float,
    ),
    "generations": _schema(
        prompt_id=_text, scale=_text, sample=_int, temperature=_float, text=_text, num_tokens=_int,
        finish_reason=_text, concept_score=_float, detected=_bool, language=_text,
    ),
    "dose": _schema(scale=_text, norm=_float, **_KL, concept_score=_float),
    "presence": _schema(
        texts=_text, sinks=_text, mean_projection=_float, max_projection=_float, mean_cos=_float, effect_size=_float,
        auroc=_float, num_tokens=_int,
    ),
    "composition": _schema(
        k=_int, members=pa.list_(_int), rule=_text, scale=_text, norm=_float, **_KL, concept_score=_float, text=_text,
    ),
    "geometry": _schema(
        norm=_float, cos_base=_float, cos_contrast=_float, max_abs_cos_unembedding=_float, nearest_token=_text,
        bessel_bound=_float,
    ),
    "jacobian": _schema(dimension=_int, row=pa.list_(_float)),
    "linear": _schema(
        norm=_float, relative_loss=_float, linear_loss=_float, linear_loss_at_radius=_float,
        found_linear_loss=_float, first_order=_float, cos=_float, mirrored_share=_float, half_share=_float,
        solution_loss=_float, kl_from_base=_float,
    ),
    "gain": _schema(
        point=_text, fraction=_float, norm=_float, along=_float, gain=_float, sensitivity=_float,
        sensitivity_beside=_float,
    ),
    "hessian": _schema(dimension=_int, row=pa.list_(_float)),
    "curvature": _schema(
        norm=_float, along=_float, first_order=_float, second_order=_float, positive=_float, relative_loss=_float,
        kl_from_base=_float,
    ),
    "convergence": _schema(
        layer=_int, position=_text, cos_base=_float, displacement=_float, vector=pa.list_(_float),
    ),
    "token_cosines": _schema(layer=_int, cos_base=pa.list_(_float)),
    "mediation": _schema(
        layer=_int, subspace=_text, rank=_int, norm=_float, kl_from_base=_float, kl_from_unsteered=_float,
        agreement=_float, concept_score=_float,
    ),
    "frozen": _schema(
        attention=_text, norm=_float, kl_from_base=_float, kl_from_unsteered=_float, moved=_float, cos=_float,
        left_out=_text,
    ),
    "efficiency": _schema(
        norm=_float, loss_own=_float, loss_at_1r=_float, loss_at_2r=_float, loss_at_4r=_float, loss_noise_05=_float,
        loss_noise_10=_float, kl_neutral=_float, natural_share=_float,
    ),
    "independence": _schema(ablated=_text, change=_float, profile=_float),
    "privileged": _schema(
        partner=_text, p=_float, p_orthogonal=_float, norm_pure=_float, norm_partner=_float, norm_mixed=_float,
        left_out=_text,
    ),
    "summary": _schema(figure=_text, value=_double),
    "failures": _schema(evaluation=_text, error=_text, attempts=_int),
}  # fmt: skip


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Build the table `name` from rows that have exactly the columns of its schema; sorted by index.

    Raises:
        ValueError: a row has a missing or an unknown column.
    """
    schema = SCHEMAS[name]
    for row in rows:
        if row.keys() != set(schema.names):
            raise ValueError(f"a row of {name!r} differs from its schema in {sorted(row.keys() ^ set(schema.names))}")
    metadata = {"schema_version": str(SCHEMA_VERSION), "table": name}
    return pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata)).sort_by("index")
