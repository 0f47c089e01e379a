import gzip
import html
import json
import math
import re
import runpy
import shutil
import sys
from base64 import b64decode, b64encode
from hashlib import sha256

import numpy as np
import pytest

from melbo_ray.errors import UserError
from melbo_ray.report import comparison, plots
from melbo_ray.report import page as report
from melbo_ray.report.sections import SECTIONS
from melbo_ray.runs import queries
from melbo_ray.runs.manifest import Outcome
from melbo_ray.runs.schema import SCHEMAS
from tests.studies import UNSTEERED, auroc_of, kl_of, norm_of, write_part, write_study

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \u202e <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_study(
        tmp_path_factory.mktemp("runs"), concepts=("alien", "code"), num_vectors=120, text=lambda *_: HOSTILE
    )


@pytest.fixture(scope="module")
def page(run):
    assert report.render(str(run)) == f"{run}/report.html"
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def db(run):
    return queries.connect(str(run))


def block(page, name):
    return re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.DOTALL)[1]


def texts(page, concept):
    return json.loads(gzip.decompress(b64decode(block(page, f"texts-{concept}"))))


def trace(fig, name):
    return next(trace for trace in fig.data if trace.name == name)


def test_says_what_the_run_is(page):
    head = html.unescape(page[: page.index("<main>")])
    for fact in ("study", "tiny", "sha256:0123456789abcdef", "8 → 16", "10.0", "torch 2.13.0", "finished"):
        assert fact in head


def test_every_figure_of_every_concept_is_there_with_how_to_read_it(page):
    drawn = json.loads(block(page, "figures"))
    assert set(drawn["concepts"]) == {"alien", "code"}
    assert all(set(of) == {section.name for section in SECTIONS} for of in drawn["concepts"].values())
    assert drawn["comparison"]["data"]
    assert page.count("<figcaption>") == 2 * len(SECTIONS) + 1
    assert "kl_from_base" in page
    for section in SECTIONS:
        figure = page[page.index(f'<figure id="code-{section.name}"') :].partition("</figure>")[0]
        assert f"<h3>{section.title}</h3>" in html.unescape(figure)
        assert f"<figcaption>{section.caption}</figcaption>" in figure
        assert (" data-along-n>" in figure) == section.along_n


def test_every_number_and_text_of_a_run_is_in_its_page(page):
    data = texts(page, "code")
    assert len(data["texts"]["text"]) == (2 * 120 + 3) * 3 * 2
    assert set(data["texts"]["text"]) == {HOSTILE}
    chain = [i for i, kind in enumerate(data["vectors"]["kind"]) if kind == "chain"]
    assert [data["vectors"]["n"][i] for i in chain] == list(range(1, 121))
    assert data["vectors"]["norm"][chain[13]] == pytest.approx(norm_of(14, 120), rel=1e-5)
    assert data["vectors"]["kl_from_base"][chain[13]] == pytest.approx(kl_of(14, 120), rel=1e-5)
    assert data["vectors"]["top_tokens"][chain[13]] == ["def", " import"]
    assert data["prompts"]["prompt_0"] == "Text of prompt_0?"
    assert data["left_out"] == 0


def test_no_text_of_a_model_stands_in_the_page_in_clear(page):
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "alert" not in ours
    assert "onerror" not in ours


def test_scripts_are_those_the_policy_names_and_nothing_comes_from_elsewhere(page):
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 4
    hashes = {f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts}
    assert hashes == set(re.findall(r"'sha256-[^']+'", policy))
    assert "default-src 'none'" in policy
    assert not re.search(r"script-src[^;]*(unsafe|\*|https?:)", policy)
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', ours)


def test_prompts_and_names_of_a_run_are_escaped(tmp_path):
    run = write_study(tmp_path, num_vectors=2)
    manifest = json.loads((run / "run.json").read_text())
    manifest["prompts"]["code"]["training"] = manifest["run_id"] = manifest["config"]["model"] = HOSTILE
    (run / "run.json").write_text(json.dumps(manifest))
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert "<img src=x" not in page
    assert html.escape(HOSTILE, quote=False) in page


def test_the_self_check_is_told_in_the_head_and_in_a_table(tmp_path, page):
    assert 'id="checks"' not in page
    run = write_study(tmp_path, num_vectors=2)
    manifest = json.loads((run / "run.json").read_text())
    check = {"error": 3.21e-7, "tolerance": 3.4e-4, "compared": 12, "verdict": "exact", "reason": ""}
    other = check | {"verdict": "plain way", "reason": "<keys> are not kept"}
    manifest["checks"] = {"evaluator": {"node": {"slice": check, "scores": other}}}
    (run / "run.json").write_text(json.dumps(manifest))
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert "slice 3e-7, scores 3e-7 (the plain way)" in page[: page.index("<main>")]
    table = page[page.index('id="checks"') : page.index("</main>")]
    for cell in (
        "<td>3e-07</td><td>0.0003</td><td>12</td><td>exact</td><td>evaluator, node</td>",
        "&lt;keys&gt; are not",
    ):
        assert cell in table


def test_kl_figure_has_the_vectors_their_average_the_base_the_unsteered_and_the_control(db):
    fig = plots.draw_kl(db, "code")
    kl = np.array([kl_of(n, 120) for n in range(1, 121)])
    assert np.allclose(trace(fig, "vector").y, kl, rtol=1e-6)
    assert np.allclose(
        trace(fig, "moving average, 50").y[25:-24], np.convolve(kl, np.ones(50) / 50, "valid"), rtol=1e-5
    )
    assert (trace(fig, "base").x[0], trace(fig, "base").y[0]) == (0, 0)
    assert set(trace(fig, "unsteered").y) == {UNSTEERED}
    assert (trace(fig, "shuffled target").x[0], trace(fig, "shuffled target").y[0]) == (1, pytest.approx(1.9))
    random = np.array([UNSTEERED * (1 + 0.05 * math.sin(n)) for n in range(1, 121)])
    at_60 = random[60 - 26 : 60 + 24]
    low, high = (
        next(t for t in fig.data if t.legendgroup == "random, 5–95 %" and bool(t.fill) == f) for f in (False, True)
    )
    assert (low.y[59], high.y[59]) == pytest.approx(tuple(np.quantile(at_60, [0.05, 0.95])), rel=1e-5)


def test_norm_figure_has_the_norms(db):
    fig = plots.draw_norm(db, "code")
    assert np.allclose(trace(fig, "vector").y, [norm_of(n, 120) for n in range(1, 121)], rtol=1e-6)
    assert trace(fig, "base").y[0] == 10


def test_heat_map_is_the_share_of_each_prompts_unsteered_kl(db):
    heat = plots.draw_generalization(db, "code").data[0]
    assert np.shape(heat.z) == (3, 120)
    assert heat.z[0][13] == pytest.approx(kl_of(14, 120) / UNSTEERED, rel=1e-5)


def test_presence_stands_over_the_band_of_random_directions_without_sinks(db):
    fig = plots.draw_presence(db, "code")
    assert np.allclose(trace(fig, "chain vectors").y, [auroc_of("chain", n) for n in range(1, 121)], rtol=1e-6)
    low, high = (trace.y[0] for trace in fig.data if trace.legendgroup == "random, 95 % of them")
    expected = np.quantile([auroc_of("random", n) for n in range(1, 121)], [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-5)
    assert trace(fig, "chain, sinks kept").visible == "legendonly"
    assert trace(fig, "mean difference").y[0] == pytest.approx(auroc_of("contrast", 0))


def test_means_stand_beside_those_of_random_directions(db):
    fig = plots.draw_composition(db, "code")
    for name, more in (("first k, own", 0), ("random k, own", 0), ("random directions, own", 1)):
        assert np.allclose(trace(fig, name).y, [0.1 * k**0.5 + more for k in (2, 3, 5, 10, 20)], rtol=1e-6)


def test_the_page_sets_the_chain_beside_its_nulls_with_intervals(tmp_path, db):
    run = write_study(tmp_path, num_vectors=12)
    report.render(str(run))
    page = (run / "report.html").read_text()
    kinds, lines = comparison.cells(queries.connect(str(run)), "code")
    for text in (*kinds, *lines, *(value for values in lines.values() for value in values)):
        assert html.escape(text, quote=False) in page


def test_summary_counts_what_scipy_would(db):
    numbers = report.summary(db, "code", Outcome(stop_reason="min_norm", max_abs_cos=3e-8, failures=2))
    kl = np.array([kl_of(n, 120) for n in range(1, 121)])
    assert numbers["vectors"] == "120"
    assert numbers["KL from base, median"] == f"{np.median(kl):.3g} nats"
    assert numbers["vectors below 50 % of unsteered KL"] == f"{np.mean(kl < UNSTEERED / 2):.0%}".replace("%", " %")
    assert numbers["the chain ended"] == "min_norm"
    assert numbers["largest |cos| of any two"] == "3e-08"
    assert numbers["failed evaluations"] == "2"


@pytest.mark.parametrize("table", [name for name in SCHEMAS if name != "vectors"])
def test_a_missing_table_leaves_a_line_that_says_how_to_measure_it(tmp_path, table):
    run = write_study(tmp_path, num_vectors=3, without=[table])
    report.render(str(run))
    page = (run / "report.html").read_text()
    named = [section.evaluation for section in SECTIONS if section.table == table]
    assert page.count(f"Not measured: the table <code>{table}</code>") == len(named)
    assert page.count("Not measured") == len(named)
    assert all(f"--evals {name}</code> measures it" in page for name in named)


def test_a_run_with_vectors_alone_has_its_magnitudes(tmp_path):
    run = write_study(tmp_path, num_vectors=3, without=set(SCHEMAS) - {"vectors"})
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert list(json.loads(block(page, "figures"))["concepts"]["code"]) == ["norm"]
    assert texts(page, "code")["vectors"]["kl_from_base"] == [None] * 4


def test_an_empty_run_says_so(tmp_path):
    run = write_study(tmp_path, without=SCHEMAS)
    report.render(str(run))
    assert "no vectors yet" in (run / "report.html").read_text()


def test_an_empty_chain_has_its_base(tmp_path):
    run = write_study(tmp_path, num_vectors=0)
    report.render(str(run))
    page = (run / "report.html").read_text()
    assert "kl" not in json.loads(block(page, "figures"))["concepts"]["code"]
    assert texts(page, "code")["vectors"]["kind"].count("base") == 1


def test_a_chain_of_one(tmp_path):
    run = write_study(tmp_path, num_vectors=1)
    report.render(str(run))
    assert len(json.loads(block((run / "report.html").read_text(), "figures"))["concepts"]["code"]) >= 5


def test_a_vector_that_is_not_a_number_is_null_and_leaves_the_others(tmp_path):
    run = write_study(tmp_path, num_vectors=3)
    nan = {"kind": "chain", "scale": "own", "index": 4, "prompt_id": "training", "kl_from_base": np.nan, "norm": np.nan}
    write_part(run, "kl", "code", [nan], "part-1")
    write_part(run, "vectors", "code", [nan | {"vector": [np.nan] * 4}], "part-1")
    report.render(str(run))
    page = (run / "report.html").read_text()
    vectors = texts(page, "code")["vectors"]
    assert vectors["norm"][vectors["n"].index(4)] is None
    kl = [kl_of(n, 3) for n in (1, 2, 3)]
    assert trace(plots.draw_kl(queries.connect(str(run)), "code"), "moving average, 50").y[0] == pytest.approx(
        np.mean(kl)
    )
    assert f"{np.median(kl):.3g} nats" in page


def test_a_page_has_only_so_much_room_and_what_stays_out_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_ROOM", 40_000)
    draw = np.random.default_rng(0)
    noise = lambda *_: draw.integers(33, 127, size=192, dtype=np.uint8).tobytes().decode()  # noqa: E731
    run = write_study(tmp_path, text=noise)
    report.render(str(run))
    page = (run / "report.html").read_text()
    kept = texts(page, "code")["texts"]["sample"]
    assert len(block(page, "texts-code")) <= 40_000
    assert 100 < len(kept) == 83 * 3 * 2 - texts(page, "code")["left_out"]
    assert set(kept) == {0}


def job(*arguments):
    """What `python jobs/report.py` exits with, in this process: another one would load torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jobs/report.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("jobs/report.py", run_name="__main__")
    return end.value.code


def test_the_job_prints_where_the_report_is(tmp_path, capsys):
    run = write_study(tmp_path, num_vectors=2)
    assert job("--run", str(run)) == 0
    assert capsys.readouterr().out == f"report:  {run}/report.html\n"


def _spoil(part):
    part.write_bytes(part.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (shutil.rmtree, "no run at"),
        (lambda run: (run / "run.json").write_text("{"), "not the manifest of a run"),
        (lambda run: (run / "run.json").write_text('{"schema_version": 99}'), "schema version 99"),
        (lambda run: _spoil(next(run.glob("kl/*/*.parquet"))), "not a whole Parquet file"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line(tmp_path, harm, complaint):
    run = write_study(tmp_path, num_vectors=2)
    harm(run)
    with pytest.raises(UserError, match=complaint) as caught:
        report.render(str(run))
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_the_job_fails_with_one_line_and_code_2(tmp_path, capsys):
    assert job("--run", str(tmp_path)) == 2
    assert re.fullmatch(r"error: no run at .*\n", capsys.readouterr().err)


def test_figures_become_files_for_papers(tmp_path):
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium: apt-get install chromium")
    run = write_study(tmp_path, num_vectors=3, without=set(SCHEMAS) - {"vectors"})
    paths = report.export(str(run), str(tmp_path / "figures"))
    assert [path.rpartition("/")[2] for path in paths] == ["code-norm.png", "code-norm.svg"]
    assert (tmp_path / "figures" / "code-norm.png").read_bytes().startswith(b"\x89PNG")
    assert "‖θ_n‖" in (tmp_path / "figures" / "code-norm.svg").read_text()
