"""Counts beside log-probabilities over the concepts of a sweep: the sentence, its figure, and when there is none."""

import json
import re

import pytest
from markupsafe import escape
from scipy import stats

from melbo_ray.report.frequency import points, told
from melbo_ray.report.sweep import write_comparison
from tests.studies import write_part, write_study

LOG_PROBS = {"french": -4.6, "json": -3.8, "latin": -7.9, "poem": -6.4, "legal": -6.3}
BELOW = {"french": 3, "json": 5, "latin": 2, "poem": 4, "legal": 4}


def swept(folder, concepts):
    """A sweep with a run of six vectors for each concept; the page and the table."""
    for concept in concepts:
        run = write_study(folder, f"s.{concept}", concepts=(concept,), num_vectors=6, samples=1, without=("kl",))
        figure = {"kind": "unsteered", "index": 0, "figure": "neutral_log_prob", "value": LOG_PROBS[concept]}
        write_part(run, "summary", concept, [figure], "part-1")
        kls = [("unsteered", 0, 2.0), *(("chain", n, 0.1 if n <= BELOW[concept] else 1.9) for n in range(1, 7))]
        own = {"prompt_id": "training", "scale": "own"}
        write_part(run, "kl", concept, [own | {"kind": k, "index": n, "kl_from_base": kl} for k, n, kl in kls])
    table = write_comparison(str(folder), "s", {f"s.{concept}": {"concepts": concept} for concept in concepts})
    return (folder / "report.html").read_text(), table


def test_the_sentence_has_the_correlation_of_scipy_and_stands_below_its_figure(tmp_path):
    page, table = swept(tmp_path, LOG_PROBS)
    assert points(table) == {concept: (LOG_PROBS[concept], BELOW[concept]) for concept in LOG_PROBS}
    line = told(table) or ""
    rho = stats.spearmanr([*LOG_PROBS.values()], [*BELOW.values()]).statistic
    assert line.startswith("Over 5 concepts")
    assert f"is {rho:.2f} [" in line
    assert escape(line) in page
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1))
    assert page.count('class="plot"') == len(figures) == 3
    assert dict(zip(figures[2]["data"][0]["text"], figures[2]["data"][0]["y"], strict=True)) == BELOW


def test_of_few_concepts_nothing_is_said(tmp_path):
    page, table = swept(tmp_path, ["french", "json", "latin"])
    assert told(table) is None
    assert page.count('class="plot"') == 2


def test_equal_counts_have_no_order(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "BELOW", dict.fromkeys(BELOW, 6))
    _, table = swept(tmp_path, LOG_PROBS)
    assert (told(table) or "").endswith("does not exist: all have the same number.")


def test_of_several_rows_of_a_concept_the_medians_count(tmp_path):
    _, table = swept(tmp_path, LOG_PROBS)
    doubled = table.take([*range(5), 0])
    assert points(doubled) == points(table)
    assert points(table.slice(0, 0)) == {}
    assert points(table)["latin"] == pytest.approx((-7.9, 2))
