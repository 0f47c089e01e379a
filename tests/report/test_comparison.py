import math

import numpy as np
import pytest
from scipy import stats

from melbo_ray.report import comparison
from melbo_ray.report.intervals import median_interval
from melbo_ray.runs import queries
from tests.studies import UNSTEERED, directions, kl_of, write_part, write_study

N = 40


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    storage = tmp_path_factory.mktemp("runs")
    run = write_study(storage, "one", num_vectors=N)
    greedy = {"prompt_id": "training", "scale": "own", "temperature": 0.0, "sample": 0}
    rows = [
        {"kind": kind, "index": n, "detected": kl < 1, "concept_score": -kl, **greedy}
        for kind, n, _, kl in directions(N)
    ]
    write_part(run, "generations", "code", rows, "part-1")
    write_part(run, "generalization", "code", rows, "part-1")
    write_study(storage, "other", concepts=("alien",), num_vectors=3, without=("presence", "composition"))
    return queries.connect(str(storage))


@pytest.fixture(scope="module")
def found(db):
    rows = comparison.compare(db).to_arrow_table().to_pylist()
    return {(row["run_id"], row["figure"], row["kind"]): row for row in rows}


def kls(kind):
    return np.array([kl for k, _, _, kl in directions(N) if k == kind])


@pytest.mark.parametrize("kind", ["chain", "random"])
@pytest.mark.parametrize(
    ("figure", "of_kl"),
    [
        ("KL from the base, nats", lambda kl: kl),
        # Prompts of 1, 1.1 and 1.2 times the KL: a vector counts once, with its median.
        ("KL on held-out prompts", lambda kl: 1.1 * kl),
        ("concept score", lambda kl: -kl),
        ("concept score on held-out prompts", lambda kl: UNSTEERED - kl),
    ],
)
def test_medians_and_their_intervals_are_those_of_the_vectors(found, kind, figure, of_kl):
    row, values = found["one", figure, kind], of_kl(kls(kind))
    assert row["vectors"] == N
    assert row["value"] == pytest.approx(np.median(values), rel=1e-5)
    assert (row["low"], row["high"]) == pytest.approx(median_interval(values), rel=1e-5)


def test_a_share_has_wilsons_interval(found):
    row, hits = found["one", "greedy texts with the concept", "chain"], int((kls("chain") < 1).sum())
    assert 0 < hits < N
    ends = stats.binomtest(hits, N).proportion_ci(method="wilson")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((hits / N, ends.low, ends.high))


def test_one_direction_has_no_interval(found):
    row = found["one", "KL from the base, nats", "unsteered"]
    assert (row["vectors"], row["value"], row["low"], row["high"]) == (1, UNSTEERED, None, None)


def test_presence_is_measured_from_chance_on_both_sides(found):
    values = [abs(0.3 * math.sin(n) ** 2) for n in range(1, N + 1)]
    assert found["one", "presence in texts read, |AUROC − ½|", "chain"]["value"] == pytest.approx(np.median(values))


def test_means_stand_beside_means_of_random_directions(found):
    ours, null = (found["one", "KL of means, own norm", kind] for kind in ("chain", "random"))
    assert ours["value"] < null["value"]
    assert ours["vectors"] == null["vectors"]


def test_every_run_stands_for_itself(found):
    assert found["other", "KL from the base, nats", "chain"]["value"] == pytest.approx(kl_of(2, 3))
    assert ("other", "KL of means, own norm", "chain") not in found


def test_cells_are_a_line_for_each_figure_and_a_column_for_each_kind(db):
    kinds, lines = comparison.cells(db, "code")
    assert kinds == ["base", "chain", "random", "shuffled", "contrast", "unsteered"]
    value, (low, high) = np.median(kls("chain")), median_interval(kls("chain"))
    assert lines["KL from the base, nats"][1] == f"{value:.2f} [{low:.2f}, {high:.2f}] of {N}"
    assert lines["KL from the base, nats"][0] == "0.00"
    assert lines["KL of means, own norm"][0] == "–"
    assert comparison.cells(db, "absent") == ([], {})
