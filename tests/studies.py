"""Runs in storage for tests of what reads them: rows of the right shape from formulas, no measurement."""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from melbo_ray.report.sections import SECTIONS
from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS, table
from tests.judged import add_judged

UNSTEERED = 2.0
"""KL of the unsteered model from the base in every study here, nats."""

WRITTEN = {
    "vectors",
    "geometry",
    "kl",
    "generalization",
    "generations",
    "dose",
    "presence",
    "summary",
    "composition",
    "linear",
    "gain",
    "curvature",
    "convergence",
    "token_cosines",
    "mediation",
    "frozen",
    "independence",
    "privileged",
    "efficiency",
}
"""The tables that have formulas here; of others that the report shows, every vector has a row of ones."""


def kl_of(n: int, num_vectors: int) -> float:
    """KL from the base of the n-th vector: rises smoothly from 0.1 towards the unsteered one."""
    return 0.1 + 1.7 * (n / max(num_vectors, 1)) ** 2


def norm_of(n: int, num_vectors: int) -> float:
    return 10.0 - 6.0 * n / max(num_vectors, 1)


def auroc_of(kind: str, n: int) -> float:
    """Presence: above chance along the chain, on both sides of it along random directions."""
    return 0.5 + (0.1 * math.sin(n) if kind == "random" else 0.3 * math.sin(n) ** 2)


def write_study(
    storage: Path,
    run_id: str = "study",
    *,
    concepts: Sequence[str] = ("code",),
    num_vectors: int = 40,
    num_prompts: int = 3,
    samples: int = 2,
    without: Collection[str] = (),
    text: Any = lambda concept, n, prompt, sample: f"{concept} {n} {prompt} {sample}",
) -> Path:
    """A run of `num_vectors` chain vectors a concept, with every table but those in `without`."""
    run = storage / run_id
    run.mkdir(parents=True)
    prompts = [f"prompt_{i}" for i in range(num_prompts)]
    (run / "run.json").write_text(json.dumps(manifest(run_id, concepts, prompts)))
    for concept in concepts:
        for name, rows in _rows(concept, num_vectors, prompts, samples, text).items():
            if name not in without and rows:
                write_part(run, name, concept, rows)
    return run


def write_part(run: Path, name: str, concept: str, rows: Sequence[dict[str, Any]], part: str = "part-0") -> Path:
    path = run / name / f"concept={concept}" / f"{part}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = SCHEMAS[name].names
    filled = [{column: row.get(column) for column in columns} | {"run_id": run.name} for row in rows]
    pq.write_table(table(name, filled), path, compression="zstd")
    return path


def manifest(run_id: str, concepts: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "config": {
            "model": "tiny", "source_layer": 8, "target_layer": 16, "radius": 10.0, "seed": 0,
            "concepts": list(concepts),
        },
        "model": "tiny",
        "revision": None,
        "fingerprint": "sha256:0123456789abcdef",
        "seed": 0,
        "hardware": {"host": "cpu, 1 threads"},
        "seconds": 12.0,
        "created": "2026-11-23T15:00:00+00:00",
        "versions": {"torch": "2.13.0", "melbo_ray": "0.1.0"},
        "prompts": {concept: {"training": "How?", **{p: f"Text of {p}?" for p in prompts}} for concept in concepts},
        "concepts": {
            concept: {"vectors": 40, "stop_reason": "num_vectors", "max_abs_cos": 1e-8, "failures": 0}
            for concept in concepts
        },
        "status": "finished",
    }  # fmt: skip


def directions(num_vectors: int) -> Iterator[tuple[str, int, float, float]]:
    """Every direction of a study: kind, index, norm, KL from the base."""
    yield "unsteered", 0, 0.0, UNSTEERED
    yield "base", 0, 10.0, 0.0
    for n in range(1, num_vectors + 1):
        yield "chain", n, norm_of(n, num_vectors), kl_of(n, num_vectors)
        yield "random", n, norm_of(n, num_vectors), UNSTEERED * (1 + 0.05 * math.sin(n))
    yield "contrast", 0, 10.0, 1.0
    yield "shuffled", 1, 9.0, 1.9


def _rows(
    concept: str, num_vectors: int, prompts: Sequence[str], samples: int, text: Any
) -> dict[str, list[dict[str, Any]]]:
    every: list[dict[str, Any]] = [
        {"kind": k, "index": i, "norm": norm, "kl_from_base": kl} for k, i, norm, kl in directions(num_vectors)
    ]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEMAS}
    for row in every:
        kl, norm = row["kl_from_base"], row["norm"]
        score = UNSTEERED - kl
        row |= {"scale": "own", "kl_to_base": kl * 0.8, "kl_from_unsteered": score, "concept_score": score}
        if row["kind"] in ("base", "chain"):
            loss = 3.0 * kl
            rows["vectors"].append(row | {
                "vector": [norm, 0.0, 0.0, 0.0], "loss": loss, "relative_loss": loss / 12,
                "relative_loss_from_0": loss / 20, "relative_loss_from_1": loss / 12, "evaluations": 50,
                "stop_reason": "converged", "max_abs_cos": 1e-8, "seconds": 0.5, "seed": 7,
            })  # fmt: skip
        if row["kind"] == "chain":
            rows["geometry"].append(row | {"cos_contrast": 0.1, "nearest_token": " def", "bessel_bound": 0.2})
        rows["kl"].append(row | {"prompt_id": "training", "top_tokens": ["def", " import"], "top_probs": [0.6, 0.1]})
        for number, prompt in enumerate(prompts):
            rows["generalization"].append(row | {
                "prompt_id": prompt, "kl_from_base": kl * (1 + 0.1 * number), "kl_per_token": kl / 2,
                "top1_agreement": max(0.0, 1 - kl / 2), "log_likelihood_ratio": 1 - kl,
            })  # fmt: skip
            rows["generations"] += [
                row | {
                    "prompt_id": prompt, "sample": s, "temperature": float(s > 0), "num_tokens": 8,
                    "finish_reason": "length",
                    "text": text(concept, row["index"], prompt, s), "detected": score > 1,
                }
                for s in range(0 if row["kind"] == "shuffled" else samples)
            ]  # fmt: skip
        for alpha in (0.5, 1.0, 1.5, 2.0) if row["kind"] not in ("unsteered", "shuffled") else ():
            rows["dose"].append(row | {
                "scale": "alpha", "norm": alpha * norm, "kl_from_base": UNSTEERED * abs(1 - alpha) + kl,
            })  # fmt: skip
        for texts in ("concept", "neutral") if row["kind"] not in ("unsteered", "shuffled") else ():
            rows["presence"] += [
                row | {
                    "texts": texts, "sinks": sinks, "mean_projection": 0.1, "max_projection": 1.0, "mean_cos": 0.02,
                    "effect_size": 0.2, "num_tokens": 900,
                    "auroc": auroc_of(row["kind"], row["index"]) if texts == "concept" else None,
                }
                for sinks in ("kept", "dropped")
            ]  # fmt: skip
        if row["kind"] in ("base", "chain", "random"):
            add_judged(rows, row)
        if row["kind"] in ("chain", "random", "unsteered"):
            _add_why(rows, row, num_vectors)
        if row["kind"] == "base":
            rows["gain"].append(row | {"point": "base", "fraction": 1.0, "gain": 0.9, "sensitivity_beside": 0.1})
        for name in {section.table for section in SECTIONS} - WRITTEN if row["kind"] in ("base", "chain") else ():
            rows[name].append(_ones(name) | row)
    figures = {"change_point": num_vectors // 2, "bessel_rms_component": 0.7, "jacobian_most_below_half": 5.0}
    figures |= {"hessian_most_below_half": 30.0}
    for figure, value in figures.items():
        rows["summary"].append({"kind": "chain", "index": 0, "figure": figure, "value": value})
    for k in (k for k in (2, 3, 5, 10, 20) if k <= num_vectors):
        rows["composition"] += [
            {
                "kind": kind, "index": k, "k": k, "members": list(range(1, k + 1)), "rule": rule, "scale": "own",
                "norm": 5.0, "kl_from_base": 0.1 * k**0.5 + (kind == "random"), "concept_score": 1.0,
                "text": "composed",
            }
            for rule in ("first", "random")
            for kind in ("chain", "random")
        ]  # fmt: skip
    return rows


def _add_why(rows: dict[str, list[dict[str, Any]]], row: dict[str, Any], num_vectors: int) -> None:
    """A chain beside a linear one that ends at once; cosines and lost shares that rise with the layer."""
    n, chain = row["index"], row["kind"] == "chain"
    found = (
        {"relative_loss": 0.4, "found_linear_loss": 1.1, "cos": 0.05, "first_order": 0.1, "half_share": 0.2}
        if chain
        else {}
    )
    if n:
        rows["linear"].append(row | found | {"linear_loss": 0.35, "linear_loss_at_radius": 0.5})
    if chain:
        rows["linear"].append(row | {"kind": "linear", "linear_loss": 1 - 0.7 / n, "linear_loss_at_radius": 1.0})
    if row["kind"] != "unsteered":
        of_path = [("own", at, 2 * at if chain else 0.1) for at in (0.0, 0.25, 0.5, 0.75, 1.0)] + [("base", 1.0, 0.15)]
        rows["gain"] += [
            row | {"point": p, "fraction": at, "gain": gain, "sensitivity": 0.2, "sensitivity_beside": 0.1}
            for p, at, gain in of_path
        ]
        rows["curvature"].append(row | _of_form(0.8, 0.6, 0.7) if chain else row | _of_form(0.1, 0.05, 0.5))
    if chain:
        rows["curvature"].append(row | {"kind": "quadratic"} | _of_form(0.6, 1.2 - n / num_vectors, 1.0))
    for layer in range(8, 13):
        axis, share = n % 4, (layer - 8) / 4 if chain else 0.0
        vector = [share + (1 - share) * (axis == i) if i == 0 else (1 - share) * (axis == i) for i in range(4)]
        rows["convergence"] += [
            row | {"layer": layer, "position": position, "cos_base": 0.9 * share, "displacement": 1.0, "vector": vector}
            for position in ("last", "mean", "first")
        ]
        rows["token_cosines"].append(row | {"layer": layer, "cos_base": [None, share, 0.9 * share]})
    kept = row["kl_from_base"]
    for layer in (12, 16, 20):
        lost = {("none", 0): 0.0, ("last", 1): 0.05, ("other_last", 1): 0.05}
        lost |= {("base", rank): 0.6 if layer == 16 else 0.3 for rank in (1, 4)}
        lost |= {("other", rank): 0.1 for rank in (1, 4)}
        rows["mediation"] += [
            row | {
                "layer": layer, "subspace": name, "rank": rank, "kl_from_base": kept + share * (UNSTEERED - kept),
                "agreement": 1 - share, "concept_score": 3.0 - share,
            }
            for (name, rank), share in lost.items()
        ]  # fmt: skip


def _of_form(along: float, foretold: float, positive: float) -> dict[str, float]:
    return {"along": along, "first_order": 0.05, "second_order": foretold - 0.05, "positive": positive}


def _ones(name: str) -> dict[str, Any]:
    """A row of a table with 1 for every number."""
    numbers = (pa.types.is_floating, pa.types.is_integer)
    return {field.name: 1 for field in SCHEMAS[name] if any(kind(field.type) for kind in numbers)}
