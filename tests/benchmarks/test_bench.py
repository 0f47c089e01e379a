"""The benchmark measures what it says: the reference computes our loss, and the table is what was measured."""

import argparse
import dataclasses

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import bench, chain, growth, memory, reference, text
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.search.chain import Chain
from melbo_ray.search.lockstep import value_and_grad
from melbo_ray.search.solvers import adam
from melbo_ray.search.subspace import Subspace
from tests.families import directions, tiny
from tests.model.test_products import multiplies


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small():
    config = Config(source_layer=1, target_layer=3, radius=3.0, num_vectors=4, max_evaluations=5, max_relative_loss=1e6)
    return reference.Bench(tiny(), torch.arange(40, 60), directions(1)[0], config, repeats=1, quick=True)


def test_what_is_measured_on_a_real_model_has_one_base_of_its_calibrated_norm():
    options = argparse.Namespace(
        model="smollm2", shape=None, dtype="float32", device="cpu", repeats=1, quick=True, threads=1
    )
    made = bench.prepare(options)
    assert made.base.shape == (made.model.d_model,)
    assert float(made.base.norm()) == pytest.approx(made.config.radius, rel=1e-5)


def test_the_reference_takes_the_steps_that_our_adam_takes(small):
    theta, base = directions(2, seed=3)[0], directions(1)
    taken = Subspace(len(theta), 1)
    taken.add(base[0])
    start = taken.remove(theta)
    published = reference.Reference(small, start, taken.basis)
    slice, rows = small.slice(), torch.tensor([0])
    solver = adam(start, steps=4, lr=0.01 * 3 / 7, remove=taken.remove)
    ours = next(solver)
    for _ in range(3):
        losses, gradients = value_and_grad(slice, ours[None], published.z_base[None], rows, small.config)
        assert float(published.step()) == pytest.approx(float(losses[0]), rel=1e-5)
        ours = solver.send(solver.send((losses[0], gradients[0])).tolist())
        torch.testing.assert_close(published.theta.detach(), ours, rtol=1e-4, atol=1e-5)


PARTS = ["step", "beside", "equal-loss", "chain", "growth", "precision", "evaluations", "texts", "logits"]


@pytest.mark.parametrize("part", [*PARTS, pytest.param("rounded", marks=multiplies)])
def test_every_part_measures_something(small, part, monkeypatch):
    width = growth._width
    monkeypatch.setattr(growth, "_width", lambda bench, _d_model, generator: width(bench, 64, generator))
    rows = list(bench.PARTS[part](small))
    assert rows
    assert all(row.value > 0 for row in rows)
    assert {"limits": "step"}.get(rows[0].part, rows[0].part) == part.replace("-", " ")


def test_vectors_found_with_bfloat16_weights_are_as_good_judged_by_float32_ones(small):
    config = small.config.model_copy(update={"max_evaluations": 30})
    exact, rounded = growth.precision(dataclasses.replace(small, config=config))
    assert rounded.value == pytest.approx(exact.value, rel=0.25)


def test_our_greedy_texts_are_transformers_token_for_token(small):
    notes = [row.note for row in text.texts(small)]
    assert len(notes) == 3
    assert all("4 of 4 texts the same" in note for note in notes)


def test_the_table_is_written_as_parquet_and_markdown(tmp_path):
    rows = bench.main(["--shape", "tiny", "--quick", "--only", "logits,texts", "--out", str(tmp_path)])
    table = pq.read_table(tmp_path / "bench.parquet")
    assert table["case"].to_pylist() == [row.case for row in rows]
    assert b"random weights of the shape of tiny" in table.schema.metadata[b"title"]
    text = (tmp_path / "bench.md").read_text()
    assert all(f"| {row.case} |" in text for row in rows)
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {8}


def test_a_part_that_fails_is_a_row_that_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(_bench):
        yield bench.Row("logits", "first", 1.0, "s")
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(bench.PARTS, "logits", fails)
    rows = bench.main(["--shape", "tiny", "--quick", "--only", "logits,texts", "--out", str(tmp_path)])
    assert [row.case for row in rows][:2] == ["first", "stopped"]
    assert len(rows) > 2
    assert rows[1].note == "RuntimeError: out of memory"


def test_a_tiny_model_is_asked_for_what_its_workers_hold(small):
    rows = list(memory.memory(small))
    assert [row.case.rpartition(" ")[2] for row in rows] == ["chain", "evaluator"]
    for row in rows:
        asked = float(row.note.partition(" ")[0])
        # A quarter, and what libraries take by themselves: 0.2 to 0.4 GiB apart between machines.
        assert abs(asked - row.value) < 0.25 * row.value + 0.5


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"the chain failed: .*no-such-model"):
        memory._measured("chain", Config(model="./no-such-model"), packed=True)


def test_a_solver_that_ends_above_the_wanted_loss_has_no_ratio(small):
    config = small.config.model_copy(update={"num_vectors": 1})
    link = Chain(small.slice(), 0, small.base, config, "code")
    assert chain._until(-1.0, link).stop_reason == "max_evaluations"


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--only", "stpe"], "no part 'stpe'"), (["--shape", "gpt9"], "no shape 'gpt9'")]
)
def test_what_does_not_exist_is_refused(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        bench.main([*arguments, "--out", str(tmp_path)])
