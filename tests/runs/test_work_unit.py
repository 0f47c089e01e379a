"""Units of work: their names, and which of them are done."""

from melbo_ray.runs.work_unit import Task, Unit, cover, covers, of_chain


def test_a_unit_is_named_by_its_work():
    one = Unit("my-concept", "kl", "chain", 9, 16)
    assert one.name == "units/my-concept/kl.chain.000009-000016.zip"
    assert Unit.of(one.name) == one
    assert one.task is Task.EVALUATION


def test_the_searches_are_units_of_their_own_under_the_names_that_runs_have():
    base, vector = Unit.base("code"), Unit.vector("code", 7)
    assert (base.name, base.task) == ("units/code/base.base.000000-000000.zip", Task.BASE)
    assert (vector.name, vector.task) == ("units/code/chain.chain.000007-000007.zip", Task.CHAIN)
    assert (Unit.of(base.name), Unit.of(vector.name)) == (base, vector)


def test_coverage_is_kept_as_few_spans():
    done = {}
    for first, last in [(9, 16), (1, 8), (25, 32), (9, 16)]:
        cover(done, Unit("code", "dose", "chain", first, last))
    assert done == {"code": {"dose": {"chain": [[1, 16], [25, 32]]}}}
    assert covers(done, Unit("code", "dose", "chain", 3, 12))
    assert not covers(done, Unit("code", "dose", "chain", 16, 17))


def test_a_unit_of_a_share_tells_the_length_of_the_chain_that_its_rows_depend_on():
    one = Unit("code", "control", of_chain("spread", 24), 4, 4)
    assert (one.share, one.chain, Unit.of(one.name)) == ("spread", 24, one)
    assert one.part("dose") == "dose/concept=code/part-control.spread-00000.parquet"
    assert Unit("code", "kl", "chain", 9, 16).chain == 0
