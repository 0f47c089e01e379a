"""What becomes of the vectors downstream: verdicts on mediation, independence and attention."""

import numpy as np
import pytest

from melbo_ray.report import why_streams
from melbo_ray.report.finding import AGAINST, LEFT_OUT, SUPPORTS, UNDECIDED
from melbo_ray.report.intervals import median_interval
from melbo_ray.report.why import findings
from melbo_ray.runs import queries
from melbo_ray.runs.schema import SCHEMAS
from tests.studies import write_part, write_study

NATS = 2.0
TARGET = 16
D_MODEL = 100


def judged(run, hypothesis):
    (finding,) = [f for f in findings(queries.connect(str(run)), "code") if f.hypothesis.endswith(hypothesis)]
    return finding


@pytest.fixture
def run(tmp_path):
    """A run with vectors of d_model 100 and nothing else."""
    study = write_study(tmp_path, without=SCHEMAS)
    rows = [{"kind": "chain", "index": n, "norm": 2.0, "vector": [0.0] * D_MODEL} for n in range(1, 13)]
    write_part(study, "vectors", "code", rows)
    return study


def mediated(shares, count=9):
    """Vectors of KL 0.2 that lose `shares` of their effect by (subspace, rank), at the target; elsewhere all of it."""
    rows = [{"kind": "unsteered", "index": 0, "layer": TARGET, "subspace": "none", "rank": 0, "kl_from_base": NATS}]
    for n in range(1, count + 1):
        for layer in (12, TARGET):
            for (subspace, rank), share in {("none", 0): 0.0, **shares}.items():
                lost = share + 0.01 * (n % 3 - 1) if layer == TARGET else 1.0
                kl = 0.2 + (0.0 if subspace == "none" else lost) * (NATS - 0.2)
                rows.append({
                    "kind": "chain", "index": n, "layer": layer, "subspace": subspace, "rank": rank, "kl_from_base": kl,
                    "agreement": 1 - share, "concept_score": 3 - 2 * share,
                })  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("lost", "null", "verdict"),
    [
        (0.7, 0.1, SUPPORTS),
        (0.7, 0.3, UNDECIDED),  # the null loses more than a quarter
        (0.5, 0.1, UNDECIDED),  # the interval begins below a half
        (0.2, 0.1, AGAINST),
        (0.25, 0.1, UNDECIDED),  # the interval ends above a quarter
    ],
)
def test_few_directions_carry_the_effect_if_half_is_lost_at_the_target_and_not_without_others(run, lost, null, verdict):
    write_part(run, "mediation", "code", mediated({("base", 4): lost, ("other", 4): null, ("random", 4): 0.0}))
    finding = judged(run, "few directions in common")
    assert finding.verdict == verdict
    assert f"9 vectors lose {lost:.0%} [{lost - 0.01:.0%}, {lost + 0.01:.0%}] of their effect on KL" in finding.measured
    assert f"random vectors {null:.0%} [" in finding.measured
    assert f"{1 - lost:.0%} [{1 - lost:.0%}, {1 - lost:.0%}] stays the likeliest" in finding.measured
    assert "(of the whole displacement's 100%)" in finding.measured
    assert f"gains {3 - 2 * lost:.2f} [" in finding.measured
    assert "nats per token (3.00)" in finding.measured


def test_a_single_direction_is_that_of_the_last_token_where_it_was_measured(run):
    shares = {("base", 4): 0.9, ("base", 1): 0.0, ("other", 4): 0.0, ("other", 1): 0.0}
    write_part(run, "mediation", "code", mediated(shares))
    assert judged(run, "single direction").verdict == AGAINST
    write_part(run, "mediation", "code", mediated({**shares, ("last", 1): 0.8}))
    finding = judged(run, "single direction")
    assert finding.verdict == SUPPORTS
    assert "the base's displacement at the last token (rank 1)" in finding.measured
    assert judged(run, "few directions in common").verdict == SUPPORTS


def test_without_a_null_or_with_too_few_vectors_that_have_an_effect_mediation_is_not_decided(run):
    write_part(run, "mediation", "code", mediated({("base", 4): 0.9}))
    assert judged(run, "few directions in common").verdict == LEFT_OUT
    rows = mediated({("base", 4): 0.9, ("other", 4): 0.0})
    idle = [row | {"kl_from_base": NATS} if row["index"] > 7 else row for row in rows]
    write_part(run, "mediation", "code", idle)
    finding = judged(run, "few directions in common")
    assert finding.verdict == UNDECIDED
    assert "7 vectors lose 90%" in finding.measured


def pairs(changes, profile, count=9):
    """Pairs whose profile of rms `profile` changes by what is ablated; a random direction in its place changes 0.1."""
    return [
        {"kind": kind, "index": n, "ablated": ablated, "change": value + n / 1e4, "profile": profile}
        for ablated, change in changes.items()
        for kind, value in (("chain", change), ("random", 0.1))
        for n in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("vector", "base", "profile", "verdict"),
    [
        (0.01, 0.01, 2.0, SUPPORTS),
        (0.3, 0.01, 2.0, AGAINST),  # one way is enough
        (0.01, 0.3, 2.0, AGAINST),
        (0.3, 0.3, 0.19, UNDECIDED),  # twice a random unit vector's is 0.2
        (0.09, 0.09, 0.5, UNDECIDED),  # no more than a random direction, but a fifth of the profile
    ],
)
def test_vectors_and_base_are_independent_if_neither_changes_the_others_profile(run, vector, base, profile, verdict):
    write_part(run, "independence", "code", pairs({"vector": vector, "base": base}, profile))
    finding = judged(run, "independent of the base's")
    assert finding.verdict == verdict
    assert f"changes the base's cosines along the layers by {vector + 5e-4:.4f} [" in finding.measured
    assert f"Ablating the base changes a vector's cosines along the layers by {base + 5e-4:.4f} [" in finding.measured
    assert "a random direction in its place 0.1005 [" in finding.measured
    assert f"these cosines are {profile:.3f}, a random unit vector's 0.100" in finding.measured
    assert finding.measured.endswith("too little is there to ablate.") == (profile < 0.2)
    assert judged(run, "independent of its neighbours'").verdict == LEFT_OUT


def test_independence_of_the_base_needs_both_ways(run):
    write_part(run, "independence", "code", pairs({"vector": 0.01}, 2.0))
    assert judged(run, "independent of the base's").verdict == LEFT_OUT


@pytest.mark.parametrize(("change", "verdict"), [(0.3, AGAINST), (0.01, SUPPORTS)])
def test_the_two_neighbours_of_a_vector_are_one_value_of_the_interval(run, change, verdict):
    rows = pairs({"previous": change, "next": change + 0.02}, 2.0)
    write_part(run, "independence", "code", rows)
    finding = judged(run, "independent of its neighbours'")
    assert finding.verdict == verdict
    means = [change + 0.01 + n / 1e4 for n in range(1, 10)]
    low, high = median_interval(means)
    assert f"by {np.median(means):.4f} [{low:.4f}, {high:.4f}] (rms)" in finding.measured


def frozen(left, cos=0.8, count=9):
    """A vector of each kind whose displacement keeps a share `left` with frozen attention."""
    return [
        {"kind": kind, "index": n, "attention": name, "moved": 2.0 * (1 if name == "free" else share), "cos": cos}
        for kind, share in (("chain", left), ("random", 0.9))
        for n in range(1, count + 1)
        for name in ("free", "frozen")
    ]


@pytest.mark.parametrize(("left", "verdict"), [(0.8, AGAINST), (0.2, SUPPORTS)])
def test_attention_is_judged_by_what_is_left_without_it(run, left, verdict):
    write_part(run, "frozen", "code", frozen(left))
    finding = judged(run, "moving attention")
    assert finding.verdict == verdict
    told = f"{left:.0%} [{left:.0%}, {left:.0%}] of the displacement along the base's is left (9 vectors)"
    assert f"{told}; of random directions' 90% [90%, 90%]" in finding.measured


def test_vectors_whose_displacement_is_not_along_the_bases_have_no_share(run):
    rows = [row | {"cos": 0.05} if row["index"] > 7 else row for row in frozen(0.8)]
    write_part(run, "frozen", "code", rows)
    assert judged(run, "moving attention").verdict == UNDECIDED
    assert "(7 vectors)" in judged(run, "moving attention").measured
    write_part(run, "frozen", "code", frozen(0.8, cos=0.05))
    reason = "not measured: too few of 9 vectors, or of their null, have the figures that it compares"
    assert judged(run, "moving attention").measured == reason


def test_chance_is_the_rms_cosine_of_a_random_unit_vector(run):
    draws = np.random.default_rng(0).normal(size=(20_000, D_MODEL))
    rms = np.sqrt(np.mean((draws[:, 0] / np.linalg.norm(draws, axis=1)) ** 2))
    assert why_streams.chance_cosine(queries.connect(str(run)), "code") == pytest.approx(rms, rel=0.02)
