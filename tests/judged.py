"""Rows of the tables of "Why" that every study in `tests/studies.py` has besides those of a chain alone."""

from typing import Any


def add_judged(rows: dict[str, list[dict[str, Any]]], row: dict[str, Any]) -> None:
    """Dependent vectors of exponent 2, whose effect attention does not carry, which need more norm than the base."""
    chain, base = row["kind"] == "chain", row["kind"] == "base"
    rows["frozen"] += [
        row | {"attention": name, "moved": 2.0 * left, "cos": 0.8}
        for name, left in (("free", 1.0), ("frozen", 0.8 if chain else 0.9))
    ]
    rows["efficiency"].append(row | {
        "loss_at_1r": 0.0 if base else 0.9 if chain else 1.0, "loss_at_2r": 0.5 if chain else 1.1, "loss_at_4r": 1.5,
        "loss_own": 0.0 if base else 0.4 if chain else 1.0, "loss_noise_05": 0.6, "loss_noise_10": 0.8,
        "kl_neutral": 0.3 if base else 0.2 if chain else 0.1, "natural_share": 0.03 if chain else 0.02,
    })  # fmt: skip
    if not base:
        rows["independence"] += [
            row | {"ablated": name, "change": 0.2 if chain else 0.1, "profile": 0.5 if name == "vector" else 3.0}
            for name in ("vector", "base", "previous", "next")
        ]
    partners = ("random", "base", "component") if chain else ("random",)
    rows["privileged"] += [row | {"partner": name, "p": 2.0 if name == "random" else 1.5} for name in partners]
