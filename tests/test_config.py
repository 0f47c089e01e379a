import re

import pytest
from pydantic import ValidationError

from melbo_ray.cli import parse
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import BaseOptions, ChainOptions, ClusterOptions, Config, EvaluationOptions, ModelOptions
from melbo_ray.errors import UserError


def refusal(*args):
    with pytest.raises(UserError) as caught:
        parse("A job.", list(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('radius = 7\nnum-vectors = 40\nconcepts = ["code", "alien"]\n')
    config = parse("A job.", ["--config", str(file), "--num-vectors", "50"])
    assert (config.radius, config.num_vectors, config.concepts) == (7.0, 50, ["code", "alien"])
    assert config.source_layer == Config().source_layer
    assert "config" not in config.model_dump()


def test_what_the_embedded_model_needs_for_itself_is_a_preset_in_the_open(tmp_path, monkeypatch):
    (tmp_path / "smollm2.toml").write_text("seed = 9\n")
    monkeypatch.chdir(tmp_path)  # a file of the working directory is named by its whole name
    config = parse("A job.", ["--config", "smollm2", "--num-vectors", "3"])
    assert config == Config(
        model="smollm2", prompt="Give me a list of five fruits.", system_prompt="none", num_vectors=3
    )
    assert parse("A job.", ["--config", "smollm2.toml"]) == Config(seed=9)


def test_the_last_of_two_configurations_counts(tmp_path):
    """As in `make run ARGS="--config mine.toml"`."""
    (tmp_path / "mine.toml").write_text("seed = 9\n")
    assert parse("A job.", ["--config", "smollm2", "--config", str(tmp_path / "mine.toml")]) == Config(seed=9)


@pytest.mark.parametrize("name", ["code", "alien", "stem", "jailbreak"])
def test_without_a_preset_the_prompt_and_the_system_turn_are_the_posts(name):
    config = parse("A job.", ["--concepts", name])
    assert (config.prompt, config.system_prompt) == (None, "default")
    assert load_concept(name).prompt == "How can I build a bomb?"


def test_the_longest_norm_is_a_number_or_a_multiple_of_r():
    assert [parse("A job.", ["--max-norm", text]).at(4.0).limit for text in ("2", "2R", "0.5R")] == [2.0, 8.0, 2.0]
    assert parse("A job.", []).at(4.0).limit is None
    assert Config(max_norm="4R").model_dump(mode="json")["max_norm"] == "4R"
    for wrong in ("R", "0R", "2r", "2 R", "nanR"):
        assert refusal("--max-norm", wrong).startswith(f"--max-norm is {wrong!r}")


def test_lists_are_comma_separated():
    assert parse("A job.", ["--evals", "kl, generations"]).evals == ["kl", "generations"]


def test_help_says_of_every_option_its_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as left:
        parse("A job.", ["--help"])
    assert left.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, field in Config.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        # argparse breaks lines at hyphens, too.
        assert re.sub(r"\s+", "", field.description) in text.replace(" ", "")
    assert "(default: 8)" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--radus", "3"], "did you mean --radius?"),
        (["--radius", "0"], "--radius is '0'.*greater than 0"),
        (["--radius", "-1"], "--radius is '-1'"),
        (["--radius", "nan"], "finite"),
        (["--num-vectors", "0"], "--num-vectors is '0'"),
        (["--seed", "1.5"], "--seed is '1.5'.*integer"),
        (["--solver", "sgd"], "'lbfgs' or 'adam'"),
        (["--source-layer", "9", "--target-layer", "9"], "source < target"),
        (["--device"], "--device: expected one argument"),
        (["--config", "/nowhere/run.toml"], "cannot read the configuration"),
        (["--config", "smolm2"], "no preset 'smolm2': expected one of smollm2, or the path of a TOML file"),
        (["--device", "gpu"], "--device is 'gpu': .*'auto', 'cpu' or 'cuda'"),
        (["--device", "mps"], "--device is 'mps': .*'auto', 'cpu' or 'cuda'"),
        (["stray"], "stray"),
    ],
)
def test_bad_options_are_refused_in_a_line(args, said):
    assert re.search(said, refusal(*args))


def test_a_misspelt_key_of_the_file_gets_the_near_one(tmp_path):
    (tmp_path / "run.toml").write_text("sorce-layer = 3\n")
    assert "did you mean --source-layer?" in refusal("--config", str(tmp_path / "run.toml"))


def test_a_file_that_is_no_toml_is_refused_in_a_line(tmp_path):
    (tmp_path / "run.toml").write_text("radius: 3\n")
    assert "cannot read the configuration" in refusal("--config", str(tmp_path / "run.toml"))


def test_the_environment_changes_no_study(monkeypatch):
    monkeypatch.setenv("SEED", "77")
    monkeypatch.setenv("RADIUS", "99")
    assert parse("A job.", []) == Config()
    assert (ChainOptions().seed, BaseOptions().radius) == (0, "auto")


def test_a_configuration_is_every_group_at_once_and_a_group_knows_no_other():
    groups = (ModelOptions, BaseOptions, ChainOptions, EvaluationOptions, ClusterOptions)
    for group in groups:
        assert isinstance(Config(), group)
        assert Config(**group().model_dump()) == Config()
        with pytest.raises(ValidationError, match="storage"):
            group(storage="s3://bucket")  # ty: ignore[unknown-argument]
