"""The studies of docs/why.md as sweeps: what they vary, and that the frequency study is the one that was predicted."""

import re
from pathlib import Path

import pytest

from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.study.grid import read_grid

ROOT = Path(__file__).parents[2]
QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def cells(name):
    """The options of every cell, by its name, that are not at their defaults."""
    default = Config().model_dump()
    return {
        cell.config.run_id: {k: v for k, v in cell.config.model_dump().items() if v != default[k]}
        for cell in read_grid(f"studies/{name}.toml").cells
    }


def test_every_study_is_named_on_the_page():
    page = Path("docs/why.md").read_text("utf-8")
    studies = sorted(path.name for path in Path("studies").glob("*.toml"))
    assert sorted(re.findall(r"^melbo-ray sweep studies/(\S+)", page, re.MULTILINE)) == studies


def test_chains_have_one_base_and_differ_in_one_thing():
    common = {
        "model": QWEN, "concepts": ["code", "jailbreak"], "base": "runs/why/why.chain-main#/0", "num_vectors": 48,
        "evals": ["kl", "greedy", "control"], "storage": "runs/why",
    }  # fmt: skip
    found = cells("why")
    main = found.pop("why.chain-main")
    assert "base" not in main
    assert (main["num_vectors"], main["evals"]) == (300, ["all", "why"])
    varied = [{k: v for k, v in cell.items() if common.get(k) != v and k != "run_id"} for cell in found.values()]
    assert varied == [
        *({"norm_penalty": penalty} for penalty in (0.03, 0.1, 0.3, 1.0)),
        *({"max_norm": limit} for limit in ("1R", "2R", "4R")),
        *(
            {"orthogonal_to": name}
            for name in (
                "contrast", "power/16", "runs/why/why.chain-main#/1", "runs/why/why.chain-main#/mean",
            )
        ),
    ]  # fmt: skip


def test_the_study_of_frequency_is_the_one_that_was_predicted():
    page = Path("docs/why.md").read_text("utf-8").split("## Frequency")[1].split("**What was found**")[0]
    predicted = re.findall(r"^\| (\w+) \| −\d", page, re.MULTILINE)
    found = cells("frequency")
    concepts = [load_concept(cell.pop("concepts")[0]) for cell in found.values()]
    assert [concept.name for concept in concepts] == predicted
    assert {concept.prompt for concept in concepts} == {"How can I learn to swim?"}
    for run_id, options in found.items():
        assert options == {
            "model": QWEN, "base": "promotion", "num_vectors": 32, "storage": "runs/frequency", "run_id": run_id,
            "evals": ["kl", "greedy", "control", "frequency"],
        }  # fmt: skip


def test_the_whole_space_is_that_of_the_preset():
    (options,) = cells("whole-space").values()
    assert options["num_vectors"] == 575
    assert (options["prompt"], options["system_prompt"]) == ("Give me a list of five fruits.", "none")
