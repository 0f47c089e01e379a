"""What a sweep says of its studies, without a cluster."""

from types import SimpleNamespace
from typing import Any

from melbo_ray.study import sweep
from melbo_ray.study.runner import StudyRun

PLAIN = {"error": 0.0, "tolerance": 1.0, "compared": 1, "verdict": "plain way", "reason": "no keys are kept"}


def test_what_the_last_worker_told_is_said_before_its_study_ends():
    lines = []
    of_two: Any = object.__new__(sweep._Sweep)
    study: Any = object.__new__(sweep._Study)
    books: Any = object.__new__(StudyRun)
    books.display, books._announced = SimpleNamespace(say=lines.append), set()
    study._books = books
    study.member = SimpleNamespace(run_id="one", checks={"evaluator": {"here": {"texts": PLAIN}}})
    of_two._open, of_two._ending = {"one": study}, []
    of_two._finisher = SimpleNamespace(submit=lambda *_: lines.append("ends"))
    of_two._end(study.member)
    assert lines == ["self-check: texts by the plain way: no keys are kept", "ends"]
