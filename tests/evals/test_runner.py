"""Any evaluation, any batch: the tables it promises, and failures that stay with their vector."""

import dataclasses

import pytest
import torch

from melbo_ray.evals import runner
from melbo_ray.evals.catalog import EVALUATIONS, PER_VECTOR, Evaluation, Share
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.evals.runner import evaluate
from melbo_ray.runs import schema

every_evaluation = pytest.mark.parametrize("name", EVALUATIONS)
per_vector = pytest.mark.parametrize("name", PER_VECTOR)


@every_evaluation
def test_an_evaluation_writes_the_tables_it_promises_for_every_vector(study, chain, name):
    written = evaluate(name, study, chain)
    assert set(written) == {*EVALUATIONS[name].tables, "failures"}
    assert written.pop("failures").num_rows == 0
    for table, rows in written.items():
        assert rows.schema.equals(schema.table(table, []).schema)
        assert set(rows["run_id"].to_pylist()) == {"run"}
        if EVALUATIONS[name].scope == "vector":
            assert set(rows["index"].to_pylist()) == set(chain.index)


@every_evaluation
def test_no_vectors_no_rows(study, chain, name):
    written = evaluate(name, study, chain.take([]))
    assert {table: rows.num_rows for table, rows in written.items()} == dict.fromkeys(written, 0)


@every_evaluation
def test_a_chain_of_one_vector_is_a_chain(study, chain, name):
    assert evaluate(name, study, chain.take([0]))["failures"].num_rows == 0


@every_evaluation
def test_a_vector_that_is_not_finite_is_a_failure_and_the_rest_goes_on(study, chain, name):
    broken = dataclasses.replace(chain, theta=chain.theta.clone())
    broken.theta[2, 0] = torch.nan
    written = evaluate(name, study, broken)
    failures = written.pop("failures").to_pylist()
    of_vectors = [share.name for share in EVALUATIONS[name].shares if share.of_vectors]
    error = "the vector is not finite"
    assert failures == [
        {"run_id": "run", "kind": kind, "index": 3, "evaluation": name, "error": error, "attempts": 1}
        for kind in (of_vectors if EVALUATIONS[name].shares else ["chain"])
    ]
    good = evaluate(name, study, chain.take([0, 1, 3, 4]))
    assert all(rows.equals(good[table]) for table, rows in written.items())


@per_vector
@pytest.mark.parametrize("kind", ["base", "unsteered"])
def test_the_base_and_no_vector_at_all_can_be_evaluated(study, name, kind):
    theta = study.base if kind == "base" else torch.zeros_like(study.base)
    assert evaluate(name, study, Vectors(kind, [0], theta[None]))["failures"].num_rows == 0


@per_vector
def test_a_vector_is_evaluated_alike_alone_and_in_a_batch(study, chain, name):
    together, alone = evaluate(name, study, chain), evaluate(name, study, chain.take([2]))
    for table in EVALUATIONS[name].tables:
        rows = [row for row in together[table].to_pylist() if row["index"] == 3]
        for one, other in zip(rows, alone[table].to_pylist(), strict=True):
            for column in [name for name, value in one.items() if isinstance(value, list) and "top" not in name]:
                assert one.pop(column) == pytest.approx(other.pop(column), abs=1e-4)
            assert one == pytest.approx(other, abs=1e-4) if "top_probs" not in one else one["norm"] == other["norm"]


def test_failures_are_counted_over_every_try(study, chain):
    broken = dataclasses.replace(chain, theta=torch.full_like(chain.theta, torch.nan))
    rows = evaluate("kl", study, broken, {3: 1, 5: 4})["failures"].to_pylist()
    assert {row["index"]: row["attempts"] for row in rows} == {1: 1, 2: 1, 3: 2, 4: 1, 5: 5}


def replace_kl(monkeypatch, run, scope="vector", tables=("presence",)):
    """Have another function under the name `kl`, and the catalogue know it."""
    shares = (Share("share", lambda chain: range(1, chain + 1)),) if scope == "whole" else ()
    monkeypatch.setitem(runner.EVALUATIONS, "kl", Evaluation("kl", tables, scope, shares=shares))
    monkeypatch.setitem(runner.FUNCTIONS, "kl", run)


def fails_on_two(study, vectors):
    if 2 in vectors.index:
        raise RuntimeError("no memory\nfor this one")
    return {"presence": []}


def share_of_it(run):
    """The same as a share of an evaluation of the whole chain."""
    return lambda study, chain, share, items: run(study, chain.vectors.at(items))


def test_an_error_on_one_vector_is_recorded_for_it_alone(study, chain, monkeypatch):
    calls = []

    def run(study, vectors):
        calls.append(list(vectors.index))
        return fails_on_two(study, vectors)

    replace_kl(monkeypatch, run)
    failures = evaluate("kl", study, chain)["failures"].to_pylist()
    assert [(row["index"], row["error"]) for row in failures] == [(2, "RuntimeError: no memory")]
    assert calls == [[1, 2, 3, 4, 5], [1], [2], [3], [4], [5]]


def test_an_error_on_one_item_of_a_share_is_recorded_for_it_alone(study, chain, monkeypatch):
    replace_kl(monkeypatch, share_of_it(fails_on_two), "whole")
    (failure,) = evaluate("kl", study, chain, {2: 3})["failures"].to_pylist()
    assert (failure["kind"], failure["index"], failure["attempts"]) == ("share", 2, 4)
    assert failure["error"] == "RuntimeError: no memory"


def test_a_figure_that_is_not_finite_is_a_failure_not_a_row(study, chain, monkeypatch):
    def run(study, vectors):
        columns = {"evaluation": "", "error": "", "attempts": 0}
        return {"dose": [{"index": i, "norm": float("nan") if i == 4 else 1.0, **columns} for i in vectors.index]}

    replace_kl(monkeypatch, run, tables=())
    (failure,) = evaluate("kl", study, chain)["failures"].to_pylist()
    assert (failure["index"], failure["error"]) == (4, "FloatingPointError: norm is nan")


def test_what_depends_on_the_study_alone_is_made_once(study, chain):
    fresh, made = Study(study.model, study.config, study.concept, "run", study.base), []

    def make(of):
        made.append(of)
        return len(made)

    assert [fresh.once(make), fresh.once(make)] == [1, 1]
    assert made == [fresh]


def raising(error, most):
    """An evaluation that takes no more than so many vectors."""

    def run(study, vectors):
        if len(vectors) > most:
            raise error
        return {"presence": []}

    return run


@pytest.mark.parametrize(
    ("error", "scope", "most"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "vector", 1),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "whole", 1),
        (torch.OutOfMemoryError("CUDA out of memory"), "vector", 0),
        (torch.OutOfMemoryError("CUDA out of memory"), "whole", 0),
    ],
)
def test_a_gpu_that_is_broken_or_full_is_no_failure_of_the_vectors(study, chain, monkeypatch, error, scope, most):
    run = raising(error, most)
    replace_kl(monkeypatch, share_of_it(run) if scope == "whole" else run, scope)
    with pytest.raises(type(error)):
        evaluate("kl", study, chain)


def test_a_batch_that_the_gpu_has_no_room_for_is_taken_one_by_one(study, chain, monkeypatch):
    run = raising(torch.OutOfMemoryError("CUDA out of memory"), 1)
    replace_kl(monkeypatch, run)
    assert evaluate("kl", study, chain)["failures"].num_rows == 0
