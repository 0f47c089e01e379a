"""How a run is going: the time that is left."""

import re
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.report.intervals import median_interval
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import cover
from melbo_ray.study import summary
from melbo_ray.study.display import Display
from tests.clock import Clock
from tests.studies import UNSTEERED, directions, write_part, write_study

VECTORS, BATCH = 24, 8
EVALS = ["kl", "generations", "dose", "control", "geometry"]


def told(backlog, steps):
    """What the line says of a concept after each of some steps: seconds, and what happens to it then."""
    clock, out = Clock(), StringIO()
    shown = Display(Console(file=out, width=300), VECTORS, clock)
    for seconds, happens in steps:
        shown.update({"code": backlog}, {}, 1)
        clock.add(seconds)
        happens(backlog)
    shown.update({"code": backlog}, {}, 1)
    return [line.rpartition(", ")[2].strip() for line in out.getvalue().splitlines()]


def concept(vectors):
    found = Backlog("code", EVALS, BATCH, {})
    for index in range(vectors + 1):
        found.add_vector("chain" if index else "base", index, np.ones(2))
    return found


def find(backlog):
    backlog.add_vector("chain", backlog.found + 1, np.ones(2))


def evaluate(backlog):
    cover(backlog.done, backlog.due()[0])


def end(backlog):
    backlog.stop_reason = "num_vectors"


def seconds(text):
    number, unit = re.fullmatch(r"about ([\d.]+) (s|min|h) left", text).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_the_time_left_is_told_once_it_is_worth_something_and_then_about_right():
    """Where units take as long each, be they of one vector (the controls), of eight, or shares of the whole chain."""
    backlog = concept(VECTORS)
    end(backlog)
    units = 3 * (2 + 3) + (3 + 8 + 1 + 1) + (1 + 1)
    lines = told(backlog, [(10, evaluate)] * units)
    assert backlog.due() == []
    assert lines[:3] == ["time left not known yet"] * 3
    truth = [10 * (units - done) for done in range(3, units + 1)]
    assert [seconds(line) for line in lines[3:]] == pytest.approx(truth, abs=30)


def test_the_slower_of_chain_and_evaluations_rules():
    (*_, line) = told(concept(4), [(30, find)] * 4 + [(5, evaluate)] * 4)
    assert seconds(line) == pytest.approx(16 / 4 * 140, rel=0.1)
    (*_, line) = told(concept(20), [(5, find)] * 4 + [(30, evaluate)] * 4)
    units = 3 * (2 + 3) + (3 + 8 + 1 + 1) + (1 + 1)
    assert seconds(line) == pytest.approx((units - 4) / 4 * 140, rel=0.1)


def test_the_time_left_follows_what_has_changed_of_late():
    """A second evaluator has come: from half of the units on, they take half the time."""
    backlog = concept(VECTORS)
    backlog.batch = 1
    end(backlog)
    units = len(backlog.due())
    lines = told(backlog, [(20, evaluate)] * (units // 2) + [(10, evaluate)] * (units // 4))
    assert seconds(lines[-1]) == pytest.approx(10 * (units - units // 2 - units // 4), rel=0.1)


def judged(index, rank, text, **columns):
    none = {"objective": 1.0, "concept_score": 0.5, "coherence": -1.0, "held_out_texts": None, "taken": False}
    return {"kind": "candidate", "index": index, "rank": rank, "text": text, "reason": f"why {index}"} | none | columns


def shown(table):
    out = StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_the_table_of_candidates_has_all_of_them_the_best_first_and_says_why_one_was_taken(tmp_path):
    rows = [
        judged(0, 2, "no [bold]markup[/bold]"),
        judged(1, 1, "print(1)", taken=True, held_out_texts=["a", "b"], held_out_gained=1),
    ]
    write_part(tmp_path / "study", "candidates", "code", rows)
    run = Run.open(str(tmp_path / "study"))
    text = shown(summary.candidates(run, "code"))
    assert text.index("print(1)") < text.index("no [bold]markup[/bold]")
    assert re.search(r"→ 1 .* 1 of 2 .* why 1", text)
    assert summary.base_reason(run, "code") == "candidate 1: why 1"
    assert summary.base_reason(run, "alien") == ""


def test_a_models_text_commands_no_terminal(tmp_path):
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9b31mc\u202ed\re\nf"
    write_part(tmp_path / "study", "candidates", "code", [judged(0, 1, hostile)])
    text = shown(summary.candidates(Run.open(str(tmp_path / "study")), "code"))
    assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert summary.printable("é\n→ 字") == "é\n→ 字"


def test_the_summary_sets_the_chains_median_kl_beside_its_nulls(tmp_path):
    run = write_study(tmp_path, num_vectors=25)
    stored = Run.open(str(run))
    table = summary.summary(stored, stored.manifest())  # ty: ignore[invalid-argument-type]
    lines = dict(zip(*(column.cells for column in table.columns), strict=True))
    values = [kl for kind, _, _, kl in directions(25) if kind == "chain"]
    low, high = median_interval(values)
    assert lines["KL from the base, nats: median [95 %]"] == f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]"
    assert lines["the same, random directions"].startswith("2.")
    assert lines["the same, shuffled targets"] == "1.90"
    assert lines["KL below 10 % of unsteered"] == str(sum(value < UNSTEERED / 10 for value in values))
    assert lines["KL below 50 % of unsteered"] == str(sum(value < UNSTEERED / 2 for value in values))
    assert lines["KL unsteered, nats"] == f"{UNSTEERED:.3f}"
