"""What is said of an evaluation before it runs is what it does, and the option `evals` names it."""

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import melbo_ray.evals
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals import catalog, dose, runner
from melbo_ray.evals.catalog import EVALUATIONS, PER_VECTOR, SAMPLED, resolve

SHARED = {"catalog", "context", "rounding", "runner", "self_check", "__init__"}


def test_an_evaluation_is_the_module_of_its_name():
    modules = {path.stem for path in Path(melbo_ray.evals.__path__[0]).glob("*.py")}
    assert set(EVALUATIONS) == modules - SHARED
    assert all(runner.FUNCTIONS[name].__module__ == f"melbo_ray.evals.{name}" for name in EVALUATIONS)


def test_the_catalogue_loads_without_torch():
    code = "import sys; sys.modules['torch'] = None; import melbo_ray.evals.catalog"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_is_every_evaluation_but_those_that_ask_why_and_the_default():
    every, why = resolve(["all"]), resolve(["why"])
    assert resolve(Config().evals) == every
    assert resolve(["all", "why"]) == list(EVALUATIONS)
    assert not set(every) & set(why)
    assert {"linear", "convergence", "mediation"} <= set(why)
    assert resolve(["dose", "kl", "dose"]) == ["dose", "kl"]
    assert resolve(["dose", "all"]) == ["dose", *(name for name in every if name != "dose")]
    assert resolve([]) == []


def test_what_an_evaluation_needs_is_run_before_it():
    assert resolve(["dose", "geometry"]) == ["dose", "kl", "geometry"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("presense", "did you mean presence?"), ("x", "expected all, or some of kl, greedy, generations")],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(name, hint):
    with pytest.raises(UserError) as refused:
        resolve(["kl", name])
    assert str(refused.value).startswith(f"no evaluation {name!r}: {hint}")
    assert "\n" not in str(refused.value)


def test_a_sample_limits_all_that_is_asked_of_single_vectors_but_kl_and_greedy_texts():
    assert set(PER_VECTOR) - set(SAMPLED) == {"kl", "greedy"}


def test_the_norms_of_a_dose_are_those_that_composition_is_counted_in():
    assert catalog._NORMS == dose.DOSES + dose._HALVINGS


def test_what_is_counted_of_the_control_is_what_it_does(study, chain, monkeypatch):
    counted: Counter[str] = Counter()

    def counting(name, run):
        def counted_run(study, vectors):
            counted[name] += len(vectors)
            return run(study, vectors)

        return counted_run

    for name in PER_VECTOR:
        module = importlib.import_module(f"melbo_ray.evals.{name}")
        monkeypatch.setattr(module, "run", counting(name, module.run))
    runner.evaluate("control", study, chain)
    assert EVALUATIONS["control"].passes is not None
    assert counted == EVALUATIONS["control"].passes(len(chain))
