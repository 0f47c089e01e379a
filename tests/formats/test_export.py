"""What is exported is read back to the bit, says where and how it steers, and is replayed on a model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from melbo_ray.cli import exit_code
from melbo_ray.commands import export as export_command
from melbo_ray.commands import verify as verify_command
from melbo_ray.errors import UserError
from melbo_ray.formats.reading import read_vectors
from melbo_ray.formats.sidecar import SUFFIX, Sidecar
from melbo_ray.formats.writing import FORMATS
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.study.export import export, numbers
from melbo_ray.study.replay import verify
from tests.families import D_MODEL, plain_logits, tiny
from tests.formats.conftest import SOURCE

every_format = pytest.mark.parametrize("format", FORMATS)


def sidecar_of(path):
    return json.loads(Path(f"{path}{SUFFIX}").read_text("utf-8"))


@every_format
def test_a_round_trip_is_exact(stored, tmp_path, format):
    files = export(stored.url, None, [0, 1, 3], format, str(tmp_path))
    assert len(files) == (1 if FORMATS[format].many else 3)
    read = torch.cat([read_vectors(str(file), D_MODEL, SOURCE) for file in files])
    assert torch.equal(read, stored.thetas[[0, 1, 3]])


@every_format
def test_the_sidecar_says_where_and_how_and_what_to_expect(stored, tmp_path, format):
    told = sidecar_of(export(stored.url, "code", [2], format, str(tmp_path))[0])
    assert told["site"] == {
        "layer": SOURCE, "module": f"model.layers.{SOURCE}", "hidden_states": SOURCE + 1,
        "hook": f"blocks.{SOURCE}.hook_resid_post",
    }  # fmt: skip
    assert (told["operation"], told["scale"], told["token_scope"]) == ("add", 1.0, "all")
    assert told["model"]["fingerprint"] == stored.model.fingerprint()
    tokens = torch.tensor(told["prompt"]["tokens"])
    p, q = (
        plain_logits(tiny(), tokens, SOURCE, theta)[-1].double().log_softmax(-1)
        for theta in (stored.thetas[2], torch.zeros(D_MODEL))
    )
    expected = told["vectors"][0]["expected"]
    assert expected["top_probs"] == pytest.approx(p.exp().topk(10).values.tolist(), rel=1e-4)
    assert expected["kl_from_unsteered"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert not [code for code in told["use"].values() if re.search(r"\{(file|layer|module|path|load)\}", code)]


def test_the_code_of_the_sidecar_steers_like_the_run(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for format in ("npy", "pt", "safetensors"):
        (file,) = export(stored.url, None, [4], format, ".")
        names: dict[str, Any] = {"torch": torch, "numpy": np, "safetensors": safetensors, "model": tiny().network}
        exec(sidecar_of(file)["use"]["transformers"], names)
        tokens = tiny().tokenize(stored.concept.prompt)
        found = tiny().network(tokens[None]).logits[0]
        names["handle"].remove()
        torch.testing.assert_close(found, plain_logits(tiny(), tokens, SOURCE, stored.thetas[4]))


def test_the_files_are_what_the_tools_load(stored, tmp_path):
    """Their loaders in a few lines; benchmarks/parity.py runs the tools themselves."""
    theta = stored.thetas[1]
    one = {name: export(stored.url, None, [1], name, str(tmp_path))[0] for name in FORMATS}
    gguf = pytest.importorskip("gguf").GGUFReader(one["gguf"])
    (tensor,) = gguf.tensors
    assert (tensor.name, tensor.data.dtype, tensor.data.ndim) == (f"direction.{SOURCE}", np.float32, 1)
    assert np.array_equal(tensor.data, theta.numpy())
    fields = {name: field.contents() for name, field in gguf.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    for tool in ("controlvector", "steeringvector"):
        assert (fields[f"{tool}.model_hint"], fields[f"{tool}.layer_count"]) == ("llama", 1)
    lm_eval = torch.load(one["lm-eval"], weights_only=True)
    assert set(lm_eval) <= {name for name, _ in tiny().network.base_model.named_modules()}
    (step,) = lm_eval.values()
    assert (step["action"], step["steering_coefficient"], step["bias"], step["head_index"]) == ("add", 1.0, None, None)
    svec = json.loads(one["svec"].read_text())
    assert torch.equal(torch.tensor(svec["directions"][str(SOURCE)], dtype=torch.float32), theta[None])
    steering = torch.load(one["steering-vectors"], weights_only=True)
    assert list(steering["layer_activations"]) == [SOURCE]
    bias = torch.load(str(one["axbench"]).replace("_weight", "_bias"), weights_only=True)
    assert bias.shape == (1,)
    assert torch.equal(safetensors.torch.load_file(one["safetensors"])["vectors"], theta[None])


@every_format
def test_a_replay_finds_what_the_run_measured(stored, tmp_path, format):
    for file in export(stored.url, None, [0, 2], format, str(tmp_path)):
        for row in verify(str(file), stored.model):
            assert row.probability == pytest.approx(0, abs=1e-5)
            assert row.kl_difference == pytest.approx(0, abs=1e-5)
            assert abs(row.norm) < 1e-6


def test_a_replay_sees_another_vector_and_another_model(stored, tmp_path):
    (file,) = export(stored.url, None, [2], "npy", str(tmp_path))
    np.save(file, stored.thetas[3:4].numpy() * 2)
    (row,) = verify(str(file), stored.model)
    assert row.norm == pytest.approx(1, rel=1e-5)
    assert row.probability != pytest.approx(0, abs=1e-3)
    assert row.kl_difference != pytest.approx(0, abs=1e-3)
    other = LanguageModel.wrap(tiny("qwen2").network, tiny().tokenizer, name="other")
    with pytest.raises(UserError, match=r"other is not the model of .*fingerprint"):
        verify(str(file), other)
    assert len(verify(str(file), other, other_model=True)) == 1


def test_an_index_is_numbers_and_spans():
    assert numbers("1-3, 7,2,0") == [1, 2, 3, 7, 0]
    for wrong in ("", "a", "3-1", "-1", "1,,2", "1-", "99999999"):
        with pytest.raises(UserError, match="expected numbers and spans"):
            numbers(wrong)


def command(main, *args):
    return exit_code(lambda: main([str(arg) for arg in args]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--index": "9"}, "no vector 9"),
        ({"--format": "onnx"}, "no format 'onnx'"),
        ({"--concept": "alien"}, "the concept 'alien'"),
        ({"--run": "nowhere"}, "no run at"),
        ({"--index": "x"}, "numbers and spans"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line_and_nothing_is_written(stored, tmp_path, capsys, options, said):
    out = tmp_path / "out"
    given = {"--run": stored.url, "--index": "1", "--format": "gguf", "--out": out} | options
    assert command(export_command.main, *(part for pair in given.items() for part in pair)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_layer_that_the_tool_cannot_name_is_refused(stored, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stored.url, copy)
    text = (copy / "run.json").read_text("utf-8")
    (copy / "run.json").write_text(text.replace('"source_layer": 1', '"source_layer": 0'), "utf-8")
    with pytest.raises(UserError, match="gguf cannot name layer 0"):
        export(str(copy), None, [1], "gguf", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert export(str(copy), None, [1], "npy", str(tmp_path / "out"))


def test_export_and_verify_are_commands(stored, tmp_path, capsys):
    args = ("--run", stored.url, "--index", "0-2", "--format", "gguf", "--out", tmp_path)
    assert command(export_command.main, *args) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(path).name for path in printed] == ["code-0.gguf", "code-1.gguf", "code-2.gguf"]
    assert command(verify_command.main, printed[1], "--device", "cpu") == 0
    assert "vector 1: KL from unsteered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: Path(f"{path}{SUFFIX}").unlink(), "has no sidecar"),
        (lambda path: Path(f"{path}{SUFFIX}").write_text("{}"), "is not a sidecar"),
        (lambda path: Path(f"{path}{SUFFIX}").write_text("{"), "is not a sidecar"),
        (lambda path: np.save(path, np.ones((2, D_MODEL), np.float32)), "holds 2 vectors, its sidecar says 1"),
        (lambda path: np.save(path, np.ones((1, 7), np.float32)), "7 entries"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "malformed or truncated"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_refused_in_a_line(stored, tmp_path, capsys, spoil, said):
    (file,) = export(stored.url, None, [1], "npy", str(tmp_path))
    spoil(file)
    assert command(verify_command.main, file, "--model", stored.model.name) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_sidecar_is_read_back(stored, tmp_path):
    (file,) = export(stored.url, None, [1], "npy", str(tmp_path))
    told = Sidecar.beside(str(file))
    assert told is not None
    assert told.encode() == Path(f"{file}{SUFFIX}").read_text("utf-8")
    assert Sidecar.beside(str(tmp_path / "none.npy")) is None
