"""The figures of the section "Why" that are medians with their 95 % intervals, the chain's beside the null's.

Each function returns None if its table has no rows of a chain.
"""

from collections.abc import Sequence

import duckdb
import numpy as np
import plotly.graph_objects as go

from melbo_ray.report.intervals import median_interval
from melbo_ray.report.plots import AVERAGE, BASE, CHAIN, CONTRAST, CONTROL, _curve, _figure
from melbo_ray.report.why_directions import efficiencies
from melbo_ray.report.why_streams import WAYS, chance_cosine, lost_shares, profile_changes
from melbo_ray.runs.queries import select

_KINDS = {
    "chain": ("found", CHAIN),
    "random": ("random direction", CONTROL),
    "base": ("base", BASE),
    "contrast": ("mean difference", CONTRAST),
    "component": ("principal component", AVERAGE),
}


def draw_mediation(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """The share of the chain's effect lost without a subspace, by layer."""
    rows = lost_shares(db, concept)
    chain = rows["kind"] == "chain"
    if not chain.any():
        return None
    fig = _grouped("layer at which is projected", "share of the effect on KL lost")
    layers = np.unique(rows["layer"][chain])
    named = {"base": ("the base's", CHAIN), "last": ("the base's at the last token", CONTRAST)}
    named |= {"other": ("a random vector's", AVERAGE), "other_last": ("a random vector's at the last token", BASE)}
    for subspace, rank in sorted(set(zip(rows["subspace"][chain], rows["rank"][chain], strict=True))):
        of = chain & (rows["subspace"] == subspace) & (rows["rank"] == rank)
        name, colour = named[subspace]
        symbol = "diamond" if rank == 1 else "circle"
        lost = [rows["lost"][of & (rows["layer"] == layer)] for layer in layers]
        _medians(fig, [f"layer {layer}" for layer in layers], lost, f"{name}, rank {rank}", colour, symbol)
    return fig


def draw_independence(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """The change of a profile without the other of a pair, beside the profile and a random unit vector's."""
    rows = profile_changes(db, concept)
    chain = rows["kind"] == "chain"
    if not chain.any():
        return None
    fig = _grouped("", "rms cosine with the stream").update_yaxes(type="log")
    labels = [f"{whose}, without {named}" for named, whose in WAYS.values()]
    for name, of, column, colour in (
        ("the cosines themselves", chain, "profile", AVERAGE),
        ("change, found", chain, "change", CHAIN),
        ("change, random direction in its place", rows["kind"] == "random", "change", CONTROL),
    ):
        _medians(fig, labels, [rows[column][of & (rows["way"] == way)] for way in WAYS], name, colour)
    chance = np.full(len(labels), chance_cosine(db, concept))
    _curve(fig, np.array(labels), chance, "a random unit vector's cosines", CONTROL, line_dash="dash")
    return fig


def draw_efficiency(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Relative losses at equal norms and under noise, and the KL on neutral texts, by kind."""
    columns = {
        "loss_at_1r": "at R", "loss_at_2r": "at 2 R", "loss_at_4r": "at 4 R", "loss_own": "at its own norm",
        "loss_noise_05": "with half of it as noise", "loss_noise_10": "with all of it as noise",
        "kl_neutral": "KL on neutral texts at R",
    }  # fmt: skip
    found = {kind: efficiencies(db, concept, kind) for kind in ("chain", "random", "base")}
    if not len(found["chain"]["rise"]):
        return None
    fig = _grouped("", "relative loss, or nats").update_yaxes(rangemode="tozero")
    for kind, rows in found.items():
        _medians(fig, [*columns.values()], [rows[name] for name in columns], *_KINDS[kind])
    return fig


def draw_privileged(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """The exponents by partner and kind."""
    rows = select(db, "SELECT kind, partner, p FROM privileged WHERE concept = ? AND isfinite(p)", concept)
    if not (rows["kind"] == "chain").any():
        return None
    fig = _grouped("mixed with", "exponent")
    for kind, (name, colour) in _KINDS.items():
        groups = [rows["p"][(rows["kind"] == kind) & (rows["partner"] == partner)] for partner in _PARTNERS]
        _medians(fig, [*_PARTNERS.values()], groups, name, colour)
    _curve(fig, np.array([*_PARTNERS.values()]), np.full(len(_PARTNERS), 2.0), "quadratic form", CONTROL)
    return fig


_PARTNERS = {
    "random": "a random direction",
    "base": "the base",
    "contrast": "the mean difference",
    "component": "a principal component",
}


def _grouped(x: str, y: str) -> go.Figure:
    """A figure whose points at one label stand side by side."""
    return _figure(x, y).update_layout(scattermode="group", scattergap=0.5, xaxis_type="category")


def _medians(
    fig: go.Figure, labels: Sequence[str], groups: Sequence[np.ndarray], name: str, colour: str, symbol: str = "circle"
) -> None:
    """A point with its interval for every label whose group has values."""
    known = [(label, group) for label, group in zip(labels, groups, strict=True) if len(group)]
    if not known:
        return
    middles = np.array([np.median(group) for _, group in known])
    low, high = np.transpose([median_interval(group) for _, group in known])
    fig.add_scatter(
        x=[label for label, _ in known], y=middles, mode="markers", name=name, offsetgroup=name,
        marker={"color": colour, "size": 9, "symbol": symbol},
        error_y={"type": "data", "symmetric": False, "array": high - middles, "arrayminus": middles - low},
    )  # fmt: skip
