"""What a newcomer reads is true: links lead somewhere, snippets and notebooks run, the data dictionary is current."""

import importlib.util
import re
from pathlib import Path

import nbclient
import nbformat
import pyarrow as pa
import pytest
import torch

import melbo_ray
from melbo_ray import Run
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs.schema import SCHEMAS
from tests.families import plain_logits, tiny
from tests.stages import LAYER, write_run

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def dictionary():
    spec = importlib.util.spec_from_file_location("data_dictionary", ROOT / "docs/data_dictionary.py")
    module = importlib.util.module_from_spec(spec)  # ty: ignore[invalid-argument-type]
    spec.loader.exec_module(module)
    return module


def test_the_data_dictionary_is_current(dictionary):
    said = "docs/data.md is not what the schema says: python docs/data_dictionary.py"
    assert (ROOT / "docs/data.md").read_text("utf-8") == dictionary.page(), said
    assert dictionary.unused() == set()


def test_the_guard_above_can_fail(dictionary):
    kl = SCHEMAS["kl"]
    with pytest.raises(KeyError, match="entropy"):
        dictionary.page({"kl": kl.append(pa.field("entropy", pa.float32()))})
    assert "kl.top_tokens" in dictionary.unused({"kl": kl.remove(kl.get_field_index("top_tokens"))})


def links(page):
    """Where the relative links of a page lead."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    return [page.parent / target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert [target for target in links(page) if not target.exists()] == []


def test_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](docs/a.md), ![b](b.png), [c](https://example.org/c), [d](d.md#part), [e](#part)")
    assert links(page) == [tmp_path / "docs/a.md", tmp_path / "b.png", tmp_path / "d.md"]


def snippets():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_readme_steers_in_three_lines(monkeypatch, tmp_path):
    _, snippet = snippets()
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs", num_vectors=130).rename(tmp_path / "runs/RUN")
    monkeypatch.chdir(tmp_path)
    model, ids = tiny(), torch.arange(40, 50)[None]
    read = []
    handle = model.network.register_forward_hook(lambda _m, _a, output: read.append(output.logits[0, -1]))
    exec(snippet, {"model": model.network, "inputs": {"input_ids": ids, "max_new_tokens": 1}})
    handle.remove()
    theta = torch.tensor(Run("runs/RUN").vectors("code")[129].theta)
    torch.testing.assert_close(read[0], plain_logits(model, ids[0], LAYER, theta)[-1], rtol=1e-4, atol=1e-4)


def test_the_readme_has_a_snippet_that_runs(monkeypatch, capsys):
    snippet, _ = snippets()
    short = {
        "BaseOptions(seed=0)": "BaseOptions(seed=0, candidates=2, melbo_steps=1, max_new_tokens=2)",
        "ChainOptions(num_vectors=4)": "ChainOptions(num_vectors=4, max_evaluations=2, max_relative_loss=99)",
    }
    for told, options in short.items():
        assert snippet.count(told) == 1
        snippet = snippet.replace(told, options)
    monkeypatch.setattr(LanguageModel, "load", lambda name: tiny(num_hidden_layers=18))
    exec(snippet, {})
    indices = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert indices == ["1", "2", "3", "4"]


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text("utf-8")
    told = re.findall(r"^::: melbo_ray\.(\w+)$", page, re.MULTILINE)
    assert sorted(told) == sorted(melbo_ray.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["query", "steer"]
