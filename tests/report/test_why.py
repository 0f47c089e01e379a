"""The verdicts of "Why" follow from the tables, and a measurement that is missing is named with its reason."""

import html

import numpy as np
import pytest

from melbo_ray.report import page as report
from melbo_ray.report import why, why_plots
from melbo_ray.report.why import AGAINST, LEFT_OUT, SUPPORTS, UNDECIDED, Finding, conclusion, findings
from melbo_ray.report.why_plots import participation
from melbo_ray.runs import queries
from tests.studies import write_part, write_study

NEW = ("linear", "convergence", "mediation", "frozen", "efficiency", "independence", "privileged")


def found(run, hypothesis):
    (finding,) = [f for f in findings(queries.connect(str(run)), "code") if hypothesis in f.hypothesis]
    return finding


def frozen(left):
    """A vector of each kind whose displacement keeps a share `left` with frozen attention."""
    return [
        {"kind": kind, "index": n, "attention": name, "moved": 2.0 * (1 if name == "free" else share), "cos": 0.8}
        for kind, share in (("chain", left), ("random", 0.9))
        for n in range(1, 6)
        for name in ("free", "frozen")
    ]


def test_the_verdicts_of_the_figures_that_a_study_has(tmp_path):
    run = write_study(tmp_path, num_vectors=12)
    assert found(run, "linear map").verdict == AGAINST
    told = found(run, "linear map").measured
    assert "About 12 vectors found have a loss below 0.5" in told
    assert "has about 1 at these norms, and none can have more than 5" in told
    assert "have 10% of the base's effect; half of their norm has 20% of theirs" in told
    assert "differs from theirs by only 0.05" in told
    assert found(run, "one thing downstream").verdict == SUPPORTS
    assert "0.00 at layer 8, 0.90 [0.90, 0.90] at layer 12" in found(run, "one thing downstream").measured
    assert found(run, "few directions").verdict == SUPPORTS
    assert "at layer 12 they lose 60% of their effect" in found(run, "few directions").measured
    assert "or random ones, 10%" in found(run, "few directions").measured


@pytest.mark.parametrize(("left", "verdict"), [(0.8, AGAINST), (0.2, SUPPORTS)])
def test_attention_is_judged_by_what_is_left_without_it(tmp_path, left, verdict):
    run = write_study(tmp_path, num_vectors=3)
    write_part(run, "frozen", "code", frozen(left))
    finding = found(run, "moving attention")
    assert finding.verdict == verdict
    assert (
        f"{left:.0%} [{left:.0%}, {left:.0%}] of the displacement is left; of random directions' 90%"
        in finding.measured
    )


@pytest.mark.parametrize(("p", "count", "verdict"), [(3.0, 8, SUPPORTS), (1.5, 8, AGAINST), (3.0, 7, UNDECIDED)])
def test_privileged_directions_have_exponents_above_two_and_above_random_ones(tmp_path, p, count, verdict):
    run = write_study(tmp_path, num_vectors=3)
    rows = [
        {"kind": kind, "index": n, "partner": "random", "p": value}
        for kind, value in (("chain", p), ("random", 2.1))
        for n in range(1, count + 1)
    ]
    write_part(run, "privileged", "code", rows)
    assert found(run, "error correction").verdict == verdict


@pytest.mark.parametrize(("change", "verdict"), [(0.3, AGAINST), (0.01, SUPPORTS)])
def test_dependent_vectors_change_the_bases_profile_more_than_random_ones(tmp_path, change, verdict):
    run = write_study(tmp_path, num_vectors=3)
    rows = [
        {"kind": kind, "index": n, "ablated": "vector", "change": value + n / 1e4}
        for kind, value in (("chain", change), ("random", 0.1))
        for n in range(1, 6)
    ]
    write_part(run, "independence", "code", rows)
    assert found(run, "independent").verdict == verdict


def test_what_was_not_measured_is_named_with_its_reason_and_nothing_fails(tmp_path):
    run = write_study(tmp_path, num_vectors=1, without=[*NEW, "presence", "summary"])
    reason = "this model's attention is not called through the interface"
    write_part(run, "frozen", "code", [{"kind": "chain", "index": 1, "attention": "free", "left_out": reason}])
    assert {f.verdict for f in findings(queries.connect(str(run)), "code")} == {LEFT_OUT}
    assert found(run, "moving attention").measured == f"not measured: {reason}"
    assert found(run, "linear map").measured == "not measured: the chain has fewer than two vectors"
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert "Nothing that decides between the hypotheses has been measured." in page


def test_a_longer_chain_is_told_which_evaluation_to_add(tmp_path):
    run = write_study(tmp_path, num_vectors=3, without=["linear"])
    assert found(run, "linear map").measured == "not measured: add --evals linear"


def test_the_page_has_every_finding_and_a_sentence_in_the_end(tmp_path):
    run = write_study(tmp_path, num_vectors=12)
    report.render(str(run))
    page = (run / "report.html").read_text()
    told = findings(queries.connect(str(run)), "code")
    for finding in told:
        assert (
            html.escape(finding.measured, quote=False) in html.unescape(page).replace("&", "&amp;")
            or finding.measured in page
        )
    assert conclusion(told) in html.unescape(page)


def test_the_conclusion_counts():
    told = [
        Finding("a", "", SUPPORTS),
        Finding("b", "", AGAINST),
        Finding("c", "", UNDECIDED),
        Finding("d", "", LEFT_OUT),
    ]
    assert conclusion(told) == "Of 3 hypotheses measured, 1 are supported (a) and 1 contradicted (b)."


def test_the_participation_ratio_is_that_of_the_eigenvalues():
    draws = np.random.default_rng(0).normal(size=(7, 20)) + 2
    units = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    eigen = np.linalg.eigvalsh(units @ units.T)
    assert participation(draws) == pytest.approx(eigen.sum() ** 2 / (eigen**2).sum())
    assert participation(np.eye(5)) == pytest.approx(5)
    assert participation(np.ones((5, 3))) == pytest.approx(1)


def test_the_figures_are_of_the_tables(tmp_path):
    db = queries.connect(str(write_study(tmp_path, num_vectors=8)))
    lines = {trace.name: trace for trace in why_plots.draw_linear(db, "code").data}
    assert lines["linear chain"].y == pytest.approx([1 - 0.7 / n for n in range(1, 9)])
    assert lines["found"].y == pytest.approx([0.4] * 8)
    lines = {trace.name: trace for trace in why_plots.draw_convergence(db, "code").data}
    assert lines["cosine, last position"].y == pytest.approx(0.9 * np.arange(5) / 4)
    ratios = lines["participation ratio / vectors, chain"].y
    assert (ratios[0], ratios[-1]) == pytest.approx((4 / 8, 1 / 8))
    lines = {trace.name: trace for trace in why_plots.draw_mediation(db, "code").data}
    assert lines["the base's, rank 4"].y == pytest.approx([0.3, 0.6])
    assert lines["a random vector's, rank 1"].y == pytest.approx([0.1, 0.1])
    assert why.lost_shares(db, "code")["lost"].max() == pytest.approx(0.6)
