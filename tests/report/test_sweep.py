"""The runs of a sweep beside each other: the table's figures are those of the runs, and the page is whole."""

import base64
import hashlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.report.sweep import FIGURES, lines, write_comparison
from tests.studies import UNSTEERED, kl_of, norm_of, write_part, write_study

CELLS = {
    "s.radius-auto": {"radius": "auto", "concepts": ["code", "alien"]},
    "s.radius-7": {"radius": 7, "concepts": "code"},
    "s.radius-9": {"radius": 9, "concepts": "code"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep of which one cell has not begun, and a run in its folder that is none of its cells."""
    folder = tmp_path_factory.mktemp("s")
    write_study(folder, "s.radius-auto", concepts=("code", "alien"), num_vectors=40, samples=1)
    write_study(folder, "s.radius-7", num_vectors=3, without=("generations",))
    write_study(folder, "other", num_vectors=3)
    # Of what one cannot write, a third is detected.
    greedy = {"prompt_id": "training", "scale": "own", "temperature": 0.0, "sample": 0}
    rows = [{"kind": "chain", "index": n, "detected": n % 3 == 0, **greedy} for n in range(1, 41)]
    (folder / "s.radius-auto/generations/concept=code/part-0.parquet").unlink()
    write_part(folder / "s.radius-auto", "generations", "code", rows)
    return folder, write_comparison(str(folder), "s <b>", CELLS)


def test_a_row_for_every_run_and_concept_with_the_figures_of_the_run(written):
    folder, table = written
    assert pq.read_table(folder / "sweep.parquet").equals(table)
    rows = table.to_pylist()
    assert [(row["run_id"], row["concept"], row["radius"], row["vectors"]) for row in rows] == [
        ("s.radius-auto", "alien", "auto", 40), ("s.radius-auto", "code", "auto", 40), ("s.radius-7", "code", "7", 3),
    ]  # fmt: skip
    row, kl = rows[1], np.array([kl_of(n, 40) for n in range(1, 41)])
    norms, below = np.array([norm_of(n, 40) for n in range(1, 41)]), int((kl < UNSTEERED / 2).sum())
    assert row["norm"] == pytest.approx(np.median(norms))
    assert (row["norm_low"], row["norm_high"]) == pytest.approx(median_interval(norms), rel=1e-5)
    share = stats.binomtest(below, 40).proportion_ci(method="wilson")
    assert (row["below_half"], row["stop_reason"]) == (below, "num_vectors")
    assert (row["below_half_low"], row["below_half_high"]) == pytest.approx((40 * share.low, 40 * share.high))
    assert row["neutral_log_prob"] is None
    assert row["kl"] == pytest.approx(np.median(kl), rel=1e-5)
    assert (row["kl_low"], row["kl_high"]) == pytest.approx(median_interval(kl), rel=1e-5)
    assert row["kl_unsteered"] == UNSTEERED
    assert row["kl_random"] == pytest.approx(np.median([UNSTEERED * (1 + 0.05 * np.sin(n)) for n in range(1, 41)]))
    assert row["kl_random_low"] < row["kl_random"] < row["kl_random_high"]
    assert row["texts"] == pytest.approx(13 / 40)
    assert (row["texts_low"], row["texts_high"]) == pytest.approx(share_interval(13, 40))
    assert rows[2]["texts"] is rows[2]["texts_low"] is None
    assert table.schema.names == ["run_id", "concept", "radius", "concepts", *FIGURES]


def test_the_lines_say_the_same(written):
    headings, rows = lines(written[1])
    assert headings[:3] == ["concept", "radius", "vectors"]
    assert rows[1][:4] == ["code", "auto", "40", "num_vectors"]
    assert re.fullmatch(r"6\.92 \[6\.\d+, 7\.\d+\]", rows[1][4])
    assert re.fullmatch(r"29 \[2\d, 3\d\]", rows[1][5])
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, \d\.\d+\]", rows[1][6])
    assert (rows[1][7], rows[1][-1], rows[2][-1]) == ("2", "32% [20%, 48%]", "–")


def test_the_page_is_whole_its_scripts_are_allowed_and_names_are_text(written):
    page = (written[0] / "report.html").read_text()
    assert "s &lt;b&gt;" in page
    assert "<b>" not in page
    assert '<a href="s.radius-auto/report.html">' in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = re.findall(r"'sha256-([^']+)'", page)
    assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts] == allowed
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1))
    assert [len(figure["data"]) for figure in figures] == [3, 3]
    assert figures[0]["data"][0]["y"] == ["alien · radius auto", "code · radius auto", "code · radius 7"]
    assert "://" not in page.replace(page[page.index(scripts[0]) :][: len(scripts[0])], "")
