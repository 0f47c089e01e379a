"""Bad input ends in one line and exit code 2, before anything is written or Ray is started."""

import os

import pytest
import ray
import torch

from melbo_ray.__main__ import main
from tests.s3 import environment, serve

BAD = {
    "unknown model": ({"model": "/nowhere/model"}, "cannot load the model '/nowhere/model'"),
    "layer out of range": ({"target_layer": 6}, "layers 1 → 6 are out of range: the model has 6"),
    "source not below target": ({"source_layer": 3}, "source layer 3 is not below target layer 3"),
    "no radius": ({"radius": 0}, "--radius is"),
    "more vectors than dimensions": ({"num_vectors": 64}, "at most 63"),
    "no vectors": ({"num_vectors": 0}, "--num-vectors"),
    "unknown concept": ({"concepts": "cod"}, "no concept 'cod'"),
    "two concepts of one name": ({"concepts": "code,code"}, "each once"),
    "unknown evaluation": ({"evals": "kl,presense"}, "did you mean presence?"),
    "misspelt option": ({"radiu": 3}, "did you mean --radius?"),
    "no base file": ({"base": "nowhere.npy"}, "there is no such file"),
    "bad run id": ({"run_id": "../elsewhere"}, "--run-id is '../elsewhere'"),
    "fewer than least evaluators": ({"min_evaluators": 3, "max_evaluators": 2}, "--max-evaluators 2 is below"),
    "a chain on two GPUs": ({"chain_gpus": 2}, "--chain-gpus is 2: a chain runs on one GPU"),
    "an evaluator on a GPU and a half": ({"eval_gpus": 1.5}, "--eval-gpus is 1.5: above 1 whole GPUs"),
    "storage of one process": ({"storage": "memory://runs"}, "lives in one process"),
    "unknown protocol": ({"storage": "nosuch://runs"}, "nosuch"),
    "credential in the url": ({"storage": "s3://key:hunter2@bucket/runs"}, "holds a credential"),
    "file in the way": ({"storage": f"{__file__}/runs"}, "storage"),
    "no permission": ({"storage": "/proc/runs"}, "storage"),
}


@pytest.fixture
def ortho(tiny, tmp_path, monkeypatch, capsys):
    """`melbo-ray run` in this process: (options) → (exit code, error output); Ray must not be started."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))

    def call(**options):
        named = {"concepts": "code", **options}
        concepts = named.pop("concepts")
        arguments = tiny.options(str(tmp_path / "runs"), "run") | named
        if concepts != "code":
            path = tiny.folder / "code.toml"
            arguments["concepts"] = concepts.replace("code", str(path)) if "," in concepts else concepts
        return main(["run", *(f"--{k.replace('_', '-')}={v}" for k, v in arguments.items())]), capsys.readouterr().err

    return call


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(ortho, tmp_path, options, message):
    code, said = ortho(**options)
    assert (code, said.count("\n")) == (2, 1), said
    assert message in said
    assert "hunter2" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_empty_or_longer_than_the_context(ortho, tiny, tmp_path):
    definition = (tiny.folder / "code.toml").read_text()
    for prompt, message in ((" ", "prompt is empty"), ("x" * 300, "shorten it")):
        (tmp_path / "odd.toml").write_text(definition.replace("How is code?", prompt))
        code, said = ortho(concepts=str(tmp_path / "odd.toml"))
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
    assert os.listdir(tmp_path) == ["odd.toml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(ortho, tmp_path):
    code, said = ortho(device="cuda")
    assert (code, said.count("\n")) == (2, 1)
    assert "no usable CUDA device" in said
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_in_a_configuration_file(ortho, tmp_path):
    (tmp_path / "run.toml").write_text("num_vecors = 3\n")
    code, said = ortho(config=str(tmp_path / "run.toml"))
    assert (code, said.count("\n")) == (2, 1)
    assert "did you mean --num-vectors?" in said


def test_a_submitted_job_with_results_in_the_folder_that_ray_deletes(ortho, tmp_path, monkeypatch):
    unpacked = tmp_path / "working_dir_files" / "package"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    code, said = ortho(storage="runs")
    assert (code, said.count("\n")) == (2, 1)
    assert "give an absolute path" in said
    assert os.listdir(unpacked) == []


def test_storage_that_refuses_or_is_not_there(ortho, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("weed")) as s3:
        for variables, message in (
            (s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong-hunter2"}, "access denied"),
            (s3.through(1), "cannot be reached"),
        ):
            with environment(variables):
                code, said = ortho(storage="s3://bucket/runs")
            assert (code, said.count("\n")) == (2, 1)
            assert message in said
            assert "hunter2" not in said


def test_the_checks_leave_a_good_configuration_alone(ortho):
    with pytest.raises(pytest.fail.Exception, match="Ray was started"):
        ortho()
