"""The points of the figures of "Why" are medians of the tables, with the intervals of `intervals.median_interval`."""

import numpy as np
import pytest

from melbo_ray.report import why_median_plots, why_plots, why_streams
from melbo_ray.report.intervals import median_interval
from melbo_ray.runs import queries
from melbo_ray.runs.schema import SCHEMAS
from tests.studies import write_part, write_study

DRAWN = [
    why_median_plots.draw_mediation, why_median_plots.draw_independence, why_median_plots.draw_efficiency,
    why_median_plots.draw_privileged, why_plots.draw_frozen,
]  # fmt: skip


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return queries.connect(str(write_study(tmp_path_factory.mktemp("why"), num_vectors=8)))


def points(figure):
    """The points of each trace, as a value by label."""
    return {trace.name: dict(zip(trace.x, np.asarray(trace.y).tolist(), strict=True)) for trace in figure.data}


def test_mediation_is_the_share_lost_by_layer(db):
    of = points(why_median_plots.draw_mediation(db, "code"))
    assert of["the base's, rank 4"] == pytest.approx({"layer 12": 0.3, "layer 16": 0.6, "layer 20": 0.3}, abs=1e-6)
    assert of["the base's at the last token, rank 1"]["layer 16"] == pytest.approx(0.05, abs=1e-6)
    assert of["a random vector's, rank 1"]["layer 16"] == pytest.approx(0.1, abs=1e-6)
    assert why_streams.lost_shares(db, "code")["lost"].max() == pytest.approx(0.6)


def test_frozen_is_the_share_left_against_n(db):
    of = points(why_plots.draw_frozen(db, "code"))
    assert of["found"] == pytest.approx(dict.fromkeys(range(1, 9), 0.8))
    assert of["random"] == pytest.approx(dict.fromkeys(range(1, 9), 0.9))


def test_independence_is_the_change_beside_the_profile_and_chance(db):
    of = points(why_median_plots.draw_independence(db, "code"))
    labels = [
        "the base's, without a vector",
        "a vector's, without the base",
        "a vector's, without a neighbour in the chain",
    ]
    assert of["change, found"] == pytest.approx(dict.fromkeys(labels, 0.2))
    assert of["change, random direction in its place"] == pytest.approx(dict.fromkeys(labels, 0.1))
    assert of["the cosines themselves"] == pytest.approx(dict(zip(labels, [0.5, 3.0, 3.0], strict=True)))
    assert of["a random unit vector's cosines"] == pytest.approx(dict.fromkeys(labels, 0.5))  # 4 dimensions


def test_efficiency_is_the_losses_and_the_kl_by_kind(db):
    of = points(why_median_plots.draw_efficiency(db, "code"))
    assert [of[name]["at R"] for name in ("found", "random direction", "base")] == pytest.approx([0.9, 1.0, 0.0])
    assert of["found"]["with half of it as noise"] == pytest.approx(0.6)
    assert of["base"]["KL on neutral texts at R"] == pytest.approx(0.3)


def test_privileged_is_the_exponent_by_partner(db):
    of = points(why_median_plots.draw_privileged(db, "code"))
    assert of["found"] == pytest.approx({"a random direction": 2.0, "the base": 1.5, "a principal component": 1.5})
    assert of["random direction"] == pytest.approx({"a random direction": 2.0})


def test_a_point_has_the_interval_of_its_median(tmp_path):
    run, values = write_study(tmp_path, without=SCHEMAS), np.random.default_rng(0).normal(2.0, 0.2, 9)
    rows = [{"kind": "chain", "index": n, "partner": "random", "p": p} for n, p in enumerate(values.tolist(), 1)]
    write_part(run, "privileged", "code", [*rows, {"kind": "base", "index": 0, "partner": "random", "p": 3.0}])
    found, base, _ = why_median_plots.draw_privileged(queries.connect(str(run)), "code").data
    low, high = median_interval(values.astype(np.float32))
    ends = (found.y[0] - found.error_y.arrayminus[0], found.y[0] + found.error_y.array[0])
    assert ends == pytest.approx((low, high), abs=1e-6)
    assert np.isnan(base.error_y.array[0])


@pytest.mark.parametrize("draw", DRAWN)
def test_without_rows_of_a_chain_there_is_no_figure(tmp_path, draw):
    assert draw(queries.connect(str(write_study(tmp_path, without=SCHEMAS))), "code") is None
