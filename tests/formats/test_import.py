"""A foreign chain becomes a run that every evaluation takes."""

import importlib

import numpy as np
import pytest
import torch

from melbo_ray.cli import exit_code
from melbo_ray.cluster.worker import Worker
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import EVALUATIONS, resolve
from melbo_ray.formats.sidecar import SUFFIX
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit, count
from melbo_ray.search.vector_io import named_vectors
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.export import export
from melbo_ray.study.imported import import_run
from melbo_ray.study.preflight import recheck
from tests.families import D_MODEL, directions, plain_hidden_states, tiny
from tests.formats.conftest import SOURCE

TARGET = 3
CONCEPT = """
name = "letters"
prompt = "How are you?"
continuations = ["def f():", "import os"]
words = ["def"]
contrast = ["Write code.", "Code, please."]
texts = ["def f(x): return x", "import os"]
neutral_texts = ["The sun is warm.", "A cat sat down."]
[held_out]
one = "Why is it so?"
"""


@pytest.fixture
def options(model, tmp_path):
    (tmp_path / "letters.toml").write_text(CONCEPT)
    return {
        "model": model.name, "concepts": [str(tmp_path / "letters.toml")], "source_layer": SOURCE,
        "target_layer": TARGET, "base": str(tmp_path / "chain.pt"), "storage": str(tmp_path / "runs"),
        "run_id": "theirs", "device": "cpu", "max_new_tokens": 4, "held_out_generations": 1, "eval_batch": 4,
    }  # fmt: skip


def vectors():
    """A base and four vectors, orthogonal but for the last one."""
    rows = torch.linalg.qr(directions(5).T).Q.T * 4
    rows[4] = rows[1] * 0.6 + rows[4] * 0.8
    return rows


def z(theta, start):
    captured, _ = plain_hidden_states(tiny(), tiny().tokenize("How are you?"), SOURCE, theta)
    return captured[TARGET][0, start:].double().numpy().mean(0)


def test_the_first_row_is_the_base_and_the_rest_the_chain_with_its_certificates(options, model):
    torch.save(vectors(), options["base"])
    run = import_run(Config(**options))
    stored = stored_vectors(run, "letters")
    assert torch.equal(stored.base.theta, vectors()[0])
    assert torch.equal(torch.stack([vector.theta for vector in stored.chain]), vectors()[1:])
    for vector, theta in zip(stored.chain, vectors()[1:], strict=True):
        for start, found in enumerate((vector.relative_loss_from_0, vector.relative_loss)):
            loss, unsteered = (np.linalg.norm(z(t, start) - z(vectors()[0], start)) for t in (theta, 0 * theta))
            assert found == pytest.approx(loss / unsteered, rel=1e-4)
        assert (vector.evaluations, vector.stop_reason) == (0, "imported")
    assert [vector.max_abs_cos for vector in stored.chain] == pytest.approx([0, 0, 0, 0.6], abs=1e-6)
    manifest = run.manifest()
    assert manifest.fingerprint == model.fingerprint()
    assert (manifest.concepts["letters"].vectors, manifest.config["num_vectors"]) == (4, 4)
    assert count(manifest.done, "letters", "chain", "chain") == 4


def test_every_evaluation_takes_it(options):
    torch.save(vectors(), options["base"])
    run = import_run(Config(**options))
    checked = recheck(run.storage.url, {"evals": "all"})
    assert checked.config.evals == resolve(["all"])
    worker = Worker(run.storage.url, "theirs", checked.config, checked.concepts, threads=1)
    worker.ready()
    stored = stored_vectors(run, "letters")
    base, rows = stored.base.theta.numpy(), torch.stack([vector.theta for vector in stored.chain]).numpy()
    for name, evaluation in EVALUATIONS.items():
        if evaluation.scope == "vector":
            assert worker.evaluate(Unit("letters", name, "chain", 1, 4), rows, base, {}).failures == 0, name
        for share in evaluation.shares:
            for item in share.items(4):
                unit = Unit("letters", name, share.kind(4), item, item)
                assert worker.evaluate(unit, None, base, {}).failures == 0, unit


def test_the_row_of_the_base_may_be_another(options):
    torch.save(vectors(), options["base"])
    stored = stored_vectors(import_run(Config(**options, base_index=2)), "letters")
    assert torch.equal(stored.base.theta, vectors()[2])
    assert torch.equal(torch.stack([vector.theta for vector in stored.chain]), vectors()[[0, 1, 3, 4]])


def test_what_was_exported_comes_back(options, stored, tmp_path):
    (file,) = export(stored.url, None, range(5), "safetensors", str(tmp_path))
    found = stored_vectors(import_run(Config(**options | {"base": str(file)})), "letters")
    assert torch.equal(torch.stack([found.base.theta, *(v.theta for v in found.chain)]), stored.thetas)


def test_a_vector_of_a_run_is_a_base(stored):
    assert torch.equal(named_vectors(f"{stored.url}#code/3", D_MODEL, SOURCE), stored.thetas[3:4])
    assert torch.equal(named_vectors(f"{stored.url}#code/0", D_MODEL, SOURCE), stored.thetas[:1])
    for name, layer, said in (
        ("#code/9", SOURCE, "no vector 9"), ("#alien/1", SOURCE, "no concept"), ("#code/x", SOURCE, "is no vector"),
        ("#code/1", 2, "for layer 1"), ("x#code/1", SOURCE, "no run at"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            named_vectors(f"{stored.url}{name}", D_MODEL, layer)
    with pytest.raises(UserError, match="d_model is 31"):
        named_vectors(f"{stored.url}#code/1", 31, SOURCE)


def refused(options, capsys, **others):
    given = options | others
    args = [f"--{k.replace('_', '-')}={','.join(v) if isinstance(v, list) else v}" for k, v in given.items()]
    command = importlib.import_module("melbo_ray.commands.import")
    code, error = exit_code(lambda: command.main(args)), capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    return error


@pytest.mark.parametrize(
    ("made", "others", "said"),
    [
        (lambda: vectors()[:, :9], {}, "9 entries"),
        (lambda: vectors() * torch.tensor([1, 1, 0, 1, 1])[:, None], {}, "norm 0"),
        (lambda: vectors() * torch.inf, {}, "not finite"),
        (vectors, {"base_index": 5}, "has 5 vectors"),
        (vectors, {"base": "contrast"}, "expected a file of vectors"),
        (vectors, {"base": "none.pt"}, "no such file"),
        (vectors, {"concepts": ["code", "alien"]}, "--concepts has 2"),
        (vectors, {"target_layer": 9}, "out of range"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_a_line_and_nothing_is_written(
    options, tmp_path, capsys, made, others, said
):
    torch.save(made(), options["base"])
    assert said in refused(options, capsys, **others)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_replaced_and_another_model_is_refused(options, stored, tmp_path, capsys):
    torch.save(vectors(), options["base"])
    import_run(Config(**options))
    before = Run.open(f"{options['storage']}/theirs").storage.get("run.json")
    assert "there is a run 'theirs'" in refused(options, capsys)
    assert Run.open(f"{options['storage']}/theirs").storage.get("run.json") == before
    (file,) = export(stored.url, None, [0, 1], "npy", str(tmp_path))
    text = (tmp_path / f"{file.name}{SUFFIX}").read_text("utf-8")
    fingerprint = stored.model.fingerprint()
    (tmp_path / f"{file.name}{SUFFIX}").write_text(text.replace(fingerprint, "0" * 64), "utf-8")
    assert "another fingerprint" in refused(options, capsys, base=file, run_id="more")
    (tmp_path / f"{file.name}{SUFFIX}").write_text(text.replace('"layer": 1', '"layer": 2'), "utf-8")
    assert "for layer 2 by its sidecar" in refused(options, capsys, base=file, run_id="more")
    assert not (tmp_path / "runs" / "more").exists()
