"""The verdicts of "Why" follow from the tables, and a measurement that is missing is named with its reason."""

import html

import numpy as np
import pytest

from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.report import page as report
from melbo_ray.report import why_plots
from melbo_ray.report.finding import AGAINST, LEFT_OUT, SUPPORTS, UNDECIDED, Finding
from melbo_ray.report.why import conclusion, findings
from melbo_ray.runs import queries
from tests.studies import write_part, write_study

NEW = [name for name, evaluation in EVALUATIONS.items() if evaluation.why]


def found(run, hypothesis):
    (finding,) = [f for f in findings(queries.connect(str(run)), "code") if f.hypothesis.endswith(hypothesis)]
    return finding


def test_the_verdicts_of_the_figures_that_a_study_has(tmp_path):
    run = write_study(tmp_path, num_vectors=12)
    assert found(run, "high rank allows as many").verdict == AGAINST
    told = found(run, "high rank allows as many").measured
    assert "12 vectors found have a loss below 0.5" in told
    assert "has about 1 at these norms, and none can have more than 5" in told
    assert "have 10% of the base's effect; half of their norm has 20% of theirs" in told
    assert "differs from theirs by only 0.05" in told
    assert found(run, "one thing downstream").verdict == SUPPORTS
    assert "alignment there with the source is 0.00 [0.00, 0.00], of random" in found(run, "downstream").measured
    assert "0.00 at layer 8, 0.90 [0.90, 0.90] at layer 12" in found(run, "one thing downstream").measured
    assert found(run, "few directions in common").verdict == SUPPORTS
    assert "12 vectors lose 60%" in found(run, "few directions in common").measured
    assert found(run, "single direction").verdict == AGAINST


@pytest.mark.parametrize(
    ("p", "without", "control", "count", "verdict"),
    [
        (3.0, 2.5, 2.4, 8, SUPPORTS),
        (2.4, 2.5, 2.4, 8, AGAINST),  # above 2, but less than effects that grow like these and do not interact
        (1.5, 1.2, 2.4, 8, AGAINST),
        (2.55, 2.5, 2.4, 8, UNDECIDED),  # random directions have as much
        (3.0, 2.5, 1.9, 8, UNDECIDED),  # what the model is known to use does not show it
        (1.5, 1.2, 1.9, 8, UNDECIDED),
        (3.0, 2.5, None, 8, UNDECIDED),
        (3.0, 2.5, 2.4, 7, UNDECIDED),
    ],
)
def test_features_have_exponents_above_two_and_those_without_interaction_and_of_random_directions(
    tmp_path, p, without, control, count, verdict
):
    run = write_study(tmp_path, num_vectors=3)
    of = {"chain": (p, without), "random": (2.1, 2.0)} | ({"component": (control, 2.0)} if control else {})
    rows = [
        {"kind": kind, "index": n, "partner": "random", "p": value, "p_orthogonal": null}
        for kind, (value, null) in of.items()
        for n in range(1, count + 1)
    ]
    write_part(run, "privileged", "code", rows)
    assert found(run, "error correction of their own").verdict == verdict


def losses(count, loss=0.4, norm=2.0):
    """Vectors of a chain, for the table `vectors`."""
    return [{"kind": "chain", "index": n, "norm": norm, "relative_loss": loss} for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("gain", "of_random", "of_base", "most", "verdict"),
    [
        (0.45, 0.02, 0.9, 4, SUPPORTS),
        (0.45, 0.5, 0.9, 4, UNDECIDED),  # random directions have as much
        (0.1, 0.02, 0.9, 4, AGAINST),
        (0.1, 0.02, 0.9, 9, UNDECIDED),  # no more were found than are allowed
        (0.1, 0.02, 0.4, 4, UNDECIDED),  # about the base the base itself has too little
        (0.1, 0.02, None, 4, UNDECIDED),
    ],
)
def test_about_another_point_it_is_linear_if_the_jacobian_there_has_the_effect(
    tmp_path, gain, of_random, of_base, most, verdict
):
    """Nine vectors of norm 2 were found: the bound (sensitivity_beside r / (g·θ₀ − ½))² is below that or is not."""
    run = write_study(tmp_path, num_vectors=9, without=["gain", "vectors"])
    write_part(run, "vectors", "code", losses(9))
    beside = most**0.5 * 0.4 / 2
    rows = [
        {"kind": kind, "index": n, "point": point, "fraction": 1.0, "gain": value, "sensitivity_beside": beside}
        for kind, value in (("chain", gain), ("random", of_random))
        for n in range(1, 10)
        for point in ("own", "base")
    ]
    base = {"kind": "base", "index": 0, "point": "base", "fraction": 1.0, "gain": of_base}
    write_part(run, "gain", "code", [*rows, *([base] if of_base else [])])
    assert found(run, "another point").verdict == verdict
    told = found(run, "another point").measured
    assert f"have {gain:.0%} [{gain:.0%}, {gain:.0%}] of its effect" in told
    assert f"random directions about the base {of_random:.0%}" in told
    if of_base == 0.9:
        assert f"takes 40% about the base, and a linear map with the Jacobian there has at most {most} " in told
        assert "found are 9." in told


@pytest.mark.parametrize(
    ("count", "loss", "of_linear", "most", "verdict"),
    [
        (12, 0.4, 12, 30, SUPPORTS),
        (12, 0.4, 8, 30, UNDECIDED),  # two thirds are not as many
        (12, 0.4, 12, 11, AGAINST),
        (12, 0.4, 12, None, SUPPORTS),
        (7, 0.4, 7, 30, UNDECIDED),
        (12, 0.9, 12, 30, UNDECIDED),  # none was found, and that is no support
    ],
)
def test_a_linear_map_explains_the_count_if_its_own_chain_has_as_many(tmp_path, count, loss, of_linear, most, verdict):
    run = write_study(tmp_path, num_vectors=count, without=["linear", "vectors", "summary"])
    write_part(run, "vectors", "code", losses(count, loss))
    figures = {"relative_loss": loss, "linear_loss": 0.4, "first_order": 0.1, "half_share": 0.3}
    rows = [{"kind": "chain", "index": n} | figures for n in range(1, count + 1)]
    rows += [{"kind": "linear", "index": n, "linear_loss": 0.4 if n <= of_linear else 0.9} for n in range(1, count + 1)]
    write_part(run, "linear", "code", rows)
    if most:
        facts = {"kind": "chain", "index": 0, "figure": "jacobian_most_below_half", "value": most}
        write_part(run, "summary", "code", [facts])
    assert found(run, "high rank allows as many").verdict == verdict
    told = found(run, "high rank allows as many").measured
    assert f"{count if loss < 0.5 else 0} vectors found have a loss below 0.5" in told
    assert ("none can have more than" in told) == (most is not None)
    assert "nan" not in told


def form(along, of_form, eigenvectors, real=0.6, count=8):
    """Vectors with a part `along` of the base's displacement, `of_form` to second order; as many eigenvectors, which
    have `eigenvectors` by the form and `real` in the model."""
    return [
        {"kind": kind, "index": n, "along": has, "first_order": 0.0, "second_order": of_form_, "positive": 0.5}
        for kind, has, of_form_ in (("chain", along, of_form), ("quadratic", real, eigenvectors), ("random", 0.1, 0.0))
        for n in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("rows", "most", "verdict"),
    [
        (form(0.8, 0.7, 0.9), 30, SUPPORTS),
        (form(0.8, 0.7, 0.9), 7, AGAINST),  # more were found than the form allows
        (form(0.8, 0.1, 0.9), 30, AGAINST),  # the vectors found have their effect by other terms
        (form(0.8, 8.0, 0.9), 30, UNDECIDED),  # the form foretells ten times the effect
        (form(0.8, 0.7, 0.3), 30, UNDECIDED),  # no eigenvector has half of the effect by the form
        (form(0.8, 0.7, 0.9, real=0.1), 30, UNDECIDED),  # nor in the model
        (form(0.8, 0.7, 0.9, count=7), 30, UNDECIDED),
        (form(0.05, 0.7, 0.9), 30, UNDECIDED),
    ],
)
def test_a_quadratic_form_explains_the_count_if_it_has_as_many_and_theirs_is_the_effect(tmp_path, rows, most, verdict):
    count = len(rows) // 3
    run = write_study(tmp_path, num_vectors=count, without=["curvature", "summary", "vectors"])
    write_part(run, "vectors", "code", losses(count))
    write_part(run, "curvature", "code", rows)
    facts = {"kind": "chain", "index": 0, "figure": "hessian_most_below_half", "value": most}
    write_part(run, "summary", "code", [facts])
    assert found(run, "quadratic form allows as many").verdict == verdict
    told = found(run, "quadratic form allows as many").measured
    weak = rows[0]["along"] < 0.1
    assert told.startswith("Fewer than two" if weak else f"{count} vectors found have a loss below 0.5")


def test_exponents_are_told_with_every_partner_and_of_directions_known_to_be_used(tmp_path):
    run = write_study(tmp_path, num_vectors=3)
    of = {
        ("chain", "random"): 2.2, ("chain", "base"): 1.1, ("chain", "component"): 2.4, ("random", "random"): 2.0,
        ("component", "random"): 3.0,
    }  # fmt: skip
    rows = [
        {"kind": kind, "index": n, "partner": partner, "p": p, "p_orthogonal": 2.3}
        for (kind, partner), p in of.items()
        for n in (1, 2)
    ]
    none = {"kind": "base", "index": 0, "partner": "contrast", "left_out": "the concept has no contrast prompts"}
    write_part(run, "privileged", "code", [*rows, none])
    told = found(run, "error correction of their own").measured
    assert "the exponent is 2.20 [2.20, 2.20], without interaction it would be 2.30; of two random directions" in told
    assert "Mixed with the base 1.10 (2.30), the leading principal components 2.40 (2.30)." in told
    assert "With a random direction the leading principal components 3.00 (2.30)." in told
    assert "No mean difference: the concept has no contrast prompts." in told


def test_an_evaluation_that_failed_says_what_went_wrong(tmp_path):
    run = write_study(tmp_path, num_vectors=3, without=["curvature"])
    error = "NotImplementedError: derivative for this attention is not implemented"
    failure = {"kind": "chain", "index": 1, "evaluation": "curvature", "error": error, "attempts": 1}
    write_part(run, "failures", "code", [failure])
    assert found(run, "quadratic form allows as many").measured == f"not measured: {error}"


def test_what_was_not_measured_is_named_with_its_reason_and_nothing_fails(tmp_path):
    run = write_study(tmp_path, num_vectors=1, without=[*NEW, "presence", "summary"])
    reason = "this model's attention is not called through the interface"
    write_part(run, "frozen", "code", [{"kind": "chain", "index": 1, "attention": "free", "left_out": reason}])
    assert {f.verdict for f in findings(queries.connect(str(run)), "code")} == {LEFT_OUT}
    assert found(run, "moving attention").measured == f"not measured: {reason}"
    assert found(run, "high rank allows as many").measured == "not measured: the chain has fewer than two vectors"
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert "Nothing that decides between the hypotheses has been measured." in page


@pytest.mark.parametrize(("num_vectors", "verdicts"), [(1, {LEFT_OUT}), (7, {UNDECIDED, LEFT_OUT})])
def test_few_vectors_decide_nothing_whatever_their_figures(tmp_path, num_vectors, verdicts):
    told = findings(queries.connect(str(write_study(tmp_path, num_vectors=num_vectors))), "code")
    assert {finding.verdict for finding in told} == verdicts
    assert not [finding for finding in told if "nan" in finding.measured.split() or "[nan" in finding.measured]
    few = [finding for finding in told if finding.verdict == UNDECIDED]
    assert all(finding.measured.endswith("7 vectors decide nothing.") for finding in few)
    assert "0 are supported and 0 contradicted" in conclusion(told) or num_vectors == 1


def test_a_longer_chain_is_told_which_evaluation_to_add(tmp_path):
    run = write_study(tmp_path, num_vectors=3, without=["linear"])
    assert found(run, "high rank allows as many").measured == "not measured: add --evals linear"


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


def test_the_figures_are_of_the_tables(tmp_path):
    db = queries.connect(str(write_study(tmp_path, num_vectors=8)))
    lines = {trace.name: trace for trace in why_plots.draw_linear(db, "code").data}
    assert lines["linear chain"].y == pytest.approx([1 - 0.7 / n for n in range(1, 9)])
    assert lines["found"].y == pytest.approx([0.4] * 8)
    lines = {trace.name: trace for trace in why_plots.draw_convergence(db, "code").data}
    assert lines["cosine, last position"].y == pytest.approx(0.9 * np.arange(5) / 4)
    ratios = lines["participation ratio / vectors, chain"].y
    assert (ratios[0], ratios[-1]) == pytest.approx((4 / 8, 1 / 8))
    kept = lines["centred kernel alignment with the source, chain"].y
    assert kept[0] == pytest.approx(1)
    assert lines["centred kernel alignment with the source, random"].y == pytest.approx(np.ones(5))
    found, random = why_plots.draw_token_cosines(db, "code").data
    assert found.z[1:, -1] == pytest.approx([1, 0.9])
    assert np.isnan(found.z[0]).all()
    assert random.z[1:] == pytest.approx(np.zeros((2, 5)))
    lines = {trace.name: trace for trace in why_plots.draw_gain(db, "code").data}
    assert lines["chain"].y == pytest.approx([0, 0.5, 1, 1.5, 2])
    lines = {trace.name: trace for trace in why_plots.draw_curvature(db, "code").data}
    assert lines["eigenvectors, by the form"].y == pytest.approx([1.2 - n / 8 for n in range(1, 9)])
    assert lines["eigenvectors, in the model"].y == pytest.approx([0.6] * 8)
    assert lines["found"].y == pytest.approx([0.8] * 8)
