import numpy as np
import pytest

from melbo_ray.cli import parse
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import resolve
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.study.preflight import check, compare, defined, recheck, recorded
from melbo_ray.study.runner import leased
from tests.families import tiny


def test_another_prompt_is_trained_on_and_then_not_held_out(tmp_path):
    prompt = "What is the capital of France?"
    checked = check(Config(prompt=prompt, concepts=["code", "alien"], storage=str(tmp_path)))
    for concept in checked.concepts:
        assert concept.prompt == prompt
        assert prompt not in concept.held_out.values()
        assert len(concept.held_out) == 35


def test_an_empty_prompt_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty"):
        check(Config(prompt=" ", storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_id", [None, "mine"])
def test_what_the_command_lacks_to_resume_its_run_is_known(tmp_path, run_id):
    checked = check(Config(run_id=run_id, storage=str(tmp_path)))
    assert checked.naming == ("" if run_id else f" with --run-id {checked.config.run_id}")


@pytest.fixture
def options(tmp_path):
    """Of a study of a tiny model with a base from a file."""
    model = tiny()
    model.network.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "base.npy", np.ones(model.d_model, np.float32))
    return {
        "model": str(tmp_path / "model"), "base": str(tmp_path / "base.npy"), "source_layer": 1, "target_layer": 2,
        "storage": str(tmp_path / "runs"), "run_id": "run",
    }  # fmt: skip


@pytest.mark.parametrize("given", [{}, {"source_layer": 1}, {"target_layer": 9}])
def test_a_shallow_model_takes_layers_at_a_third_and_two_thirds_of_its_depth_unless_some_are_given(options, given):
    layers = {name: options.pop(name) for name in ("source_layer", "target_layer")}
    if given:
        with pytest.raises(UserError, match="are out of range: the model has 4"):
            check(Config(**options, **given))
        return
    config = check(parse("", [f"--{name.replace('_', '-')}={value}" for name, value in options.items()])).config
    assert (config.source_layer, config.target_layer) == tuple(layers.values())
    # A study resumes with the layers that it has recorded.
    assert check(Config(**recorded(config))).config == config


@pytest.mark.parametrize("stored", [True, False])
def test_the_file_of_a_base_may_be_gone_once_the_base_is_stored(options, tmp_path, stored):
    config = check(Config(**options)).config
    done = {"code": {"base": {"base": [[0, 0]]}}} if stored else {}
    definitions = {concept.name: concept.model_dump() for concept in check(config).concepts}
    manifest = Manifest(config=config.model_dump(mode="json"), definitions=definitions, done=done)
    run = Run.open(f"{tmp_path}/runs/run")
    run.manifest()
    run.write_manifest(manifest)
    (tmp_path / "base.npy").unlink()
    resumes = (lambda: check(Config(**options)), lambda: recheck(f"{tmp_path}/runs/run", {"evals": "dose"}))
    for resume in resumes:
        if stored:
            assert resume().config.base == options["base"]
        else:
            with pytest.raises(UserError, match="there is no such file"):
                resume()
    with pytest.raises(UserError, match="there is no such file"):
        check(Config(**options | {"concepts": ["code", "alien"]}))


def test_what_a_base_needs_is_known_before_anything_is_written(options, tmp_path):
    bare = 'name = "bare"\nprompt = "How is it?"\ncontinuations = ["a b"]\nwords = ["a"]\n'
    (tmp_path / "bare.toml").write_text(bare)
    (tmp_path / "pairs.jsonl").write_text('{"positive": "a b"}\n')
    np.save(tmp_path / "narrow.npy", np.ones(5, np.float32))
    for others, said in (
        ({"base": "power", "dtype": "bfloat16"}, "give `dtype` float32, not bfloat16"),
        ({"orthogonal_to": "power/2", "dtype": "bfloat16"}, "give `dtype` float32, not bfloat16"),
        ({"orthogonal_to": "power/2", "prompt": "x"}, "--melbo-from 1"),
        ({"orthogonal_to": "contrast", "concepts": [str(tmp_path / "bare.toml")]}, "'bare' has no contrast prompts"),
        ({"orthogonal_to": "power/8"}, "--num-vectors is 24: .* at most 23 are left of the model's d_model 32"),
        ({"base": "power", "prompt": "x"}, "--melbo-from 1"),
        ({"base": str(tmp_path / "pairs.jsonl")}, "line 1 of .* is no pair"),
        ({"base": str(tmp_path / "narrow.npy")}, "5 entries"),
        ({"base": "runs/none#code/1"}, "no run at"),
        ({"base": "nonsense"}, "URL#concept/index"),
    ):
        with pytest.raises(UserError, match=said):
            check(Config(**options | others))
    assert not (tmp_path / "runs").exists()
    check(Config(**options | {"base": "power"}))
    check(Config(**options | {"orthogonal_to": "power/7"}))


def test_a_prompt_of_one_token_leaves_melbo_nothing_and_is_refused(options):
    melbo = options | {"base": "melbo", "prompt": "x"}
    with pytest.raises(UserError, match="--melbo-from 1: the prompt 'x' has only 1 tokens"):
        check(Config(**melbo))
    with pytest.raises(UserError, match="--z-from 1: the prompt 'x' has only 1 tokens, so none is left"):
        check(Config(**melbo, melbo_from=0))
    check(Config(**melbo, melbo_from=0, z_from=0))
    check(Config(**melbo | {"base": options["base"]}, z_from=0))


@pytest.mark.parametrize("asked", [{}, {"evals": ["all"]}])
def test_the_manifest_names_every_evaluation_where_all_are_asked_for(options, tmp_path, asked):
    checked = check(Config(**options, **asked))
    assert recorded(checked.config)["evals"] == resolve(["all"])
    run = Run.open(f"{tmp_path}/runs/run")
    run.manifest()
    begun = recorded(checked.config) | {"evals": ["dose"]}
    run.write_manifest(Manifest(config=begun, definitions=defined(checked.concepts)))
    assert recheck(run.storage.url, {}).config.evals == ["dose"]
    assert recheck(run.storage.url, {"evals": "kl"}).config.evals == ["dose", "kl"]
    assert sorted(recheck(run.storage.url, {"evals": "all"}).config.evals) == sorted(resolve(["all"]))


def test_an_option_that_the_runs_release_did_not_have_counts_at_its_default(options):
    checked = check(Config(**options))
    begun = {name: value for name, value in recorded(checked.config).items() if name != "max_norm"}
    run = Manifest(config=begun, definitions=defined(checked.concepts))
    compare(run, checked)
    with pytest.raises(UserError, match="max_norm was None and is 9"):
        compare(run, check(Config(**options, max_norm=9.0)))


def end(run, begun):
    """What a driver does that is refused once it has the lease."""
    with leased(run):
        assert run.storage.names("lease")
        if begun:
            run.storage.put("run.json", b"{}")
        raise UserError("no room")


@pytest.mark.parametrize("begun", [False, True])
def test_a_study_that_is_refused_before_it_has_begun_leaves_nothing_behind(tmp_path, begun):
    with pytest.raises(UserError, match="no room"):
        end(Run.open(f"{tmp_path}/runs/study"), begun)
    assert (tmp_path / "runs" / "study").exists() == begun


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"eval_products": "tf32"}, "`eval_products` tf32: expected an NVIDIA GPU .*: use float32"),
        (
            {"eval_products": "bfloat16"},
            "`eval_products` bfloat16: expected a CPU with AVX-512 BF16 or AMX, .*: use float32",
        ),
        ({"eval_products": "bfloat16", "dtype": "bfloat16"}, "expected float32 weights, .*: leave it out"),
    ],
)
def test_products_that_this_machine_lacks_are_refused(options, tmp_path, asked, said, monkeypatch):
    monkeypatch.setattr("melbo_ray.model.products._multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match=said):
        check(Config(**options, **asked, device="cpu"))
    assert not (tmp_path / "runs").exists()
