"""What is evaluated of a chain as a whole is cut into units, none of which grows with the chain."""

import collections
import contextlib
import itertools

import numpy as np
import pytest
import torch

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.evals.catalog import EVALUATIONS, PER_VECTOR, resolve
from melbo_ray.evals.context import Chain, Study, Vectors
from melbo_ray.evals.runner import evaluate, evaluate_share
from melbo_ray.runs import schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import cover
from tests.families import directions

WHOLE = [name for name, evaluation in EVALUATIONS.items() if evaluation.shares]
BATCH = 4


def orthogonal(count):
    axes = torch.linalg.qr(directions(count, seed=2).T).Q.T
    return Vectors("chain", range(1, count + 1), axes * torch.linspace(4, 2, count)[:, None])


def backlog(names, study, chain, **options):
    """What is due once this chain has ended."""
    found = Backlog("code", names, BATCH, {}, stop_reason="num_vectors", **options)
    found.add_vector("base", 0, study.base.numpy())
    for index, theta in zip(chain.index, chain.theta, strict=True):
        found.add_vector("chain", index, theta.numpy())
    return found


def in_units(run, study, chain, names):
    """Every unit of these evaluations in the order in which they become due, each written to the run; yields them."""
    due, issued = backlog(names, study, chain, block=study.config.block), []
    whole = Chain(study.base, chain, lambda table: run.read(table, "code"))
    while new := [unit for unit in due.due() if unit not in issued]:
        for unit in new:
            index = range(unit.first, unit.last + 1)
            if EVALUATIONS[unit.evaluation].shares:
                run.commit(unit, evaluate_share(unit.evaluation, unit.share, index, study, whole))
            else:
                theta = torch.from_numpy(np.array(due.vectors(unit)))
                run.commit(unit, evaluate(unit.evaluation, study, Vectors(unit.kind, index, theta)))
            issued.append(unit)
            cover(due.done, unit)
            yield unit


def sorted_rows(table):
    return sorted(
        table.to_pylist(),
        key=lambda row: [
            str(row.get(c)) for c in ("kind", "index", "scale", "prompt_id", "sample", "texts", "sinks", "figure")
        ],
    )


@pytest.mark.parametrize(("name", "block"), [*((name, 1) for name in WHOLE), ("shuffled", 3)])
def test_the_units_of_an_evaluation_give_the_rows_that_the_whole_chain_gives_at_once(study, tmp_path, name, block):
    chain, run = orthogonal(10), Run.open(str(tmp_path))
    blocks = Study(
        study.model,
        study.config.model_copy(update={"block": block, "max_evaluations": 5}),
        study.concept,
        "run",
        study.base,
    )
    units = list(in_units(run, blocks, chain, resolve(["kl", name])))
    # `frequency` has one figure, which no chain bears on.
    assert len([unit for unit in units if unit.evaluation == name]) >= 1 + (name != "frequency")
    expected = evaluate(name, blocks, chain)
    for table in EVALUATIONS[name].tables:
        found = run.read(table, "code")
        if table == "kl":  # among the rows of `kl` itself are those of the scale that no other evaluation has
            found = pa_without(found, evaluate("kl", blocks, chain)["kl"])
        ours, theirs = sorted_rows(found), sorted_rows(expected[table])
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            numbers = {c for c, value in other.items() if isinstance(value, float)}
            assert {c: one[c] for c in numbers} == pytest.approx({c: other[c] for c in numbers}, abs=1e-4)
            lists = {"vector", "top_probs", "top_tokens"}
            assert {c: one[c] for c in one.keys() - numbers - lists} == {
                c: other[c] for c in other.keys() - numbers - lists
            }
    assert run.read("failures", "code").num_rows == 0


def pa_without(found, others):
    """The rows of `kl` that are not of the kinds base, unsteered, or of the chain at its own norm or the radius."""
    kept = [
        row
        for row in found.to_pylist()
        if row["kind"] not in ("base", "unsteered") and (row["kind"] != "chain" or row["scale"] == "median")
    ]
    assert others.num_rows + len(kept) < found.num_rows
    return schema.table("kl", kept)


@contextlib.contextmanager
def counting(model):
    """Counts the tokens that pass through the layers of a model; yields a function that takes the count."""
    seen = [0]

    def count(_layer, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[0] += hidden.shape[0] * hidden.shape[1]

    def take():
        taken, seen[0] = seen[0], 0
        return taken

    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in model.layers]
    yield take
    for handle in handles:
        handle.remove()


def test_no_unit_passes_more_through_the_model_than_one_of_single_vectors_however_long_the_chain(study, tmp_path):
    own = Study(study.model, study.config.model_copy(update={"max_evaluations": 5}), study.concept, "run", study.base)
    for name in (*PER_VECTOR, *WHOLE):  # what is computed once a worker
        evaluate(name, own, orthogonal(1))
    most = {}
    with counting(study.model) as tokens:
        for length, names in ((BATCH, PER_VECTOR), (5, ["kl", *WHOLE]), (14, ["kl", *WHOLE])):
            run, cost = Run.open(str(tmp_path / f"{length}")), collections.defaultdict(int)
            for unit in in_units(run, own, orthogonal(length), names):
                cost[unit.sort] = max(cost[unit.sort], tokens())
            most[length] = cost
    for sort in most[14]:
        assert most[14][sort] <= most[5][sort], sort
        assert most[14][sort] <= max(most[BATCH].values()), sort


def test_every_item_of_a_chain_is_in_one_unit_and_none_in_two(study):
    due = backlog(WHOLE, study, orthogonal(30))
    seen = []
    while units := due.due():
        for unit in units:
            seen += [(unit.evaluation, unit.share, item) for item in range(unit.first, unit.last + 1)]
            cover(due.done, unit)
    wanted = [
        (name, share.name, item) for name in WHOLE for share in EVALUATIONS[name].shares for item in share.items(30)
    ]
    assert sorted(seen) == sorted(wanted)
    assert due.evaluations(30) == (len(wanted), len(wanted))
    assert due.units(30)[0] == due.units(30)[1]


def test_shuffled_units_come_one_after_the_other_and_before_the_chain_has_ended(study):
    due = backlog(["shuffled", "control"], study, orthogonal(7))
    due.stop_reason = None
    assert due.due() == []
    due.add_vector("chain", 8, np.ones(32))
    for item in range(1, 9):
        (unit,) = due.due()
        assert (unit.kind, unit.first, unit.last) == ("shuffled", item, item)
        cover(due.done, unit)
        assert due.released(unit) == due.due()
    assert due.due() == []


def test_the_summary_waits_for_the_kl_of_every_vector_and_follows_it(study):
    due = backlog(["kl", "geometry"], study, orthogonal(10))
    kl = [unit for unit in due.due() if unit.evaluation == "kl"]
    for unit in kl:
        assert "summary-of-10" not in {unit.kind for unit in due.due()}
        cover(due.done, unit)
    assert [unit.kind for unit in due.released(kl[-1])] == ["summary-of-10"]


@pytest.mark.parametrize(("matrix", "reader"), [("jacobian", "linear"), ("hessian", "curvature")])
def test_a_matrix_is_read_once_every_row_of_it_is_there(study, matrix, reader):
    due = backlog([matrix, reader], study, orthogonal(3))
    blocks = due.due()
    for unit in blocks:
        assert {waiting.evaluation for waiting in due.due()} == {matrix}
        cover(due.done, unit)
    assert due.released(blocks[-1]) == due.due()
    assert {unit.evaluation for unit in due.due()} == {reader}


def test_a_longer_chain_asks_only_for_what_depends_on_its_length(study):
    due = backlog([*WHOLE], study, orthogonal(10))
    for unit in itertools.chain.from_iterable(iter(due.due, [])):
        cover(due.done, unit)
    for index in (11, 12):
        due.add_vector("chain", index, np.ones(32))
    again = {(unit.evaluation, unit.kind, unit.first) for unit in due.due()}
    assert {key for key in again if key[1] in ("random", "contrast", "shuffled")} == {("control", "random", 11)}
    assert {key for key in again if key[:2] == ("geometry", "chain")} == {("geometry", "chain", 11)}
    assert {kind for _, kind, _ in again} >= {
        "spread-of-12",
        "more-of-12",
        "summary-of-12",
        "subsets-of-12",
        "chain-of-12",
    }
