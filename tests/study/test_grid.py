"""The grid of a sweep: its cells, their names, and what is refused before anything starts."""

from pathlib import Path

import pytest
from rich.console import Console

from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import Manifest
from melbo_ray.study import grid, sweep
from melbo_ray.study.grid import Planned, check_all, overview, read_grid, waves
from melbo_ray.study.preflight import recorded


@pytest.fixture
def read(tmp_path):
    """(text) → the grid of a file of this text."""

    def call(text):
        path = tmp_path / "small.toml"
        path.write_text(text)
        return read_grid(str(path))

    return call


def test_a_grid_is_every_combination_with_names_that_stay_when_it_grows(read):
    text = """
        [options]
        num-vectors = 5
        storage = "s3://bucket/prefix/"
        [grid]
        concepts = ["code", "my/own.toml"]
        radius = ["auto", 7.5]
        layers = [{source_layer = 8, target_layer = 16}, {source-layer = 6, target-layer = 12}]
        seed = [0]
    """
    found = read(text)
    assert (found.name, found.url, len(found.cells)) == ("small", "s3://bucket/prefix/small", 8)
    first, last = found.cells[0].config, found.cells[-1].config
    assert first.run_id == "small.concepts-code.radius-auto.source_layer-8.target_layer-16.seed-0"
    assert last.run_id == "small.concepts-own.radius-7.5.source_layer-6.target_layer-12.seed-0"
    assert (last.concepts, last.radius, last.source_layer, last.num_vectors) == (["my/own.toml"], 7.5, 6, 5)
    assert last.storage == found.url
    assert found.cells[-1].values["target_layer"] == 12
    more = read(text.replace("seed = [0]", "seed = [0, 1]"))
    assert {cell.config.run_id for cell in found.cells} < {cell.config.run_id for cell in more.cells}


NAMED = """
    [options]
    storage = "FOLDER"
    num-vectors = 2
    [grid]
    seed = [0, 1]
    [grid.chain]
    main = {num_vectors = 5}
    short = {norm-penalty = 0.1, base = "FOLDER/small/small.seed-0.chain-main#/0"}
    apart = {orthogonal_to = "FOLDER/small/small.seed-1.chain-short#/mean"}
"""


def test_options_that_go_together_may_have_a_name(read):
    found = read(NAMED)
    names = [f"small.seed-{seed}.chain-{name}" for seed in (0, 1) for name in ("main", "short", "apart")]
    assert [cell.config.run_id for cell in found.cells] == names
    assert found.cells[1].values == {"seed": 0, "chain": "short"}
    assert (found.cells[1].config.num_vectors, found.cells[1].config.norm_penalty) == (2, 0.1)


def test_a_study_that_takes_vectors_of_another_comes_after_it(read, tmp_path):
    studies = check_all(read(NAMED.replace("FOLDER", str(tmp_path))))
    names = [[(s.cell.values["seed"], s.cell.values["chain"]) for s in wave] for wave in waves(studies)]
    first, second, third = names
    assert first == [(0, "main"), (1, "main")]
    assert second == [(0, "short"), (1, "short")]
    assert third == [(0, "apart"), (1, "apart")]
    # Only those of this sweep are waited for, and its own vectors a study has never.
    with pytest.raises(UserError, match=r"small\.seed-0\.chain-short: no run at"):
        check_all(
            read(
                NAMED.replace("FOLDER/small/small.seed-0.chain-main", f"{tmp_path}/x").replace("FOLDER", str(tmp_path))
            )
        )
    own = NAMED.replace("seed-0.chain-main#/0", "seed-0.chain-short#/0").replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match="takes vectors of a study that waits for its own"):
        check_all(read(own))
    with pytest.raises(UserError, match=r"chain-short: --num-vectors is 2000"):
        check_all(read(NAMED.replace("num-vectors = 2", "num-vectors = 2000").replace("FOLDER", str(tmp_path))))


def test_long_values_have_names_that_differ(read):
    long = "How would somebody who has never done it build a bomb"
    found = read(f'[grid]\nprompt = ["{long}?", "{long}, and why?"]')
    names = [str(cell.config.run_id) for cell in found.cells]
    assert len(set(names)) == 2
    assert all(len(name) < 80 for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nseed = [0", "cannot read the sweep"),
        ("[options]\nseed = 0", "[grid] is missing or empty"),
        ("[gird]\nseed = [0]", "unknown 'gird'"),
        ("[grid]\nseed = 3", "seed in [grid] is 3: expected a list"),
        ("[grid]\nseed = []", "expected a list"),
        ("[grid]\nsead = [0]", "unknown option 'sead'; did you mean seed?"),
        ("[options]\nradiu = 3\n[grid]\nseed = [0]", "did you mean radius?"),
        ("[options]\nseed = 1\n[grid]\nseed = [0]", "'seed' is given twice"),
        ("[grid]\nseed = [1]\n[grid.chain]\na = {seed = 0}", "'seed' is given twice"),
        ("[grid.chain]\na = {sead = 0}", "unknown option 'sead'; did you mean seed?"),
        ("[grid.chain]\na = 3", "chain in [grid] is {'a': 3}: expected a list of values, or options by names"),
        ("[grid.vectors]\na = {seed = 0}", "[grid.vectors] has the name of a column of the table"),
        ("[grid]\nseed = [0]\nx = [{seed = 1}]", "'seed' is given twice"),
        ("[grid]\nstorage = ['a']", "give it under [options]"),
        ("[options]\nrun_id = 'a'\n[grid]\nseed = [0]", "studies are named by their cells"),
        ("[grid]\nseed = [0, -1]", "small.seed-1: seed is -1: "),
        ("[grid]\ntarget_layer = [16, 4]", "small.target_layer-4: source layer 8 is not below target layer 4"),
        ("[grid]\nseed = [1, 1]", "two cells have the name 'small.seed-1'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(read, text, message):
    with pytest.raises(UserError) as caught:
        read(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_cell_is_checked_and_the_one_at_fault_named(read, tmp_path):
    with pytest.raises(UserError, match=r"^small\.target_layer-40: layers 8 → 40 are out of range"):
        check_all(read(f'[options]\nstorage = "{tmp_path}"\n[grid]\ntarget_layer = [16, 40]'))
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


@pytest.fixture
def planned(read, tmp_path):
    """A checked study whose manifest says that it is finished, changed by options and by fields."""
    (study,) = check_all(read(f'[options]\nstorage = "{tmp_path}"\n[grid]\nseed = [0]'))

    def call(status="finished", **options):
        config = recorded(study.checked.config) | options
        return Planned(study.cell, study.checked, Manifest(status=status, config=config))

    return call


def test_a_study_is_finished_if_it_ended_with_these_options(planned):
    assert planned().finished
    assert planned(max_evaluators=7, eval_batch=2, device="cuda").finished
    assert not planned(status="interrupted").finished
    assert not planned(num_vectors=3).finished
    assert not planned(evals=["kl"]).finished
    assert not Planned(planned().cell, planned().checked, None).finished


def test_what_is_finished_takes_no_cluster_and_the_overview_says_so(planned, read, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "connected", lambda: pytest.fail("Ray was started"))
    found = read(f'[options]\nstorage = "{tmp_path}"\n[grid]\nseed = [0]')
    sweep.run(found, [planned()], Console(width=200))
    assert "1 studies, 1 of them finished before" in capsys.readouterr().out
    table = overview(
        found, [planned(), planned(status="interrupted"), Planned(planned().cell, planned().checked, None)]
    )
    assert list(table.columns[-1].cells) == ["finished", "to be resumed", "not begun"]


def test_studies_of_one_model_are_together_and_models_follow_in_the_order_of_the_grid(read, planned):
    done = planned()
    cells = read('[grid]\nseed = [0, 1]\nmodel = ["b", "a"]\ntarget_layer = [16, 17]').cells
    studies = [Planned(cell, grid.Checked(cell.config, [], done.checked.demands, {}), None) for cell in cells]
    groups = sweep._groups(studies)
    assert [[study.cell.values["model"] for study in group] for group in groups] == [["b"] * 4, ["a"] * 4]


def test_the_example_of_the_docs_is_a_grid(read):
    page = (Path(__file__).parents[2] / "docs/sweeps.md").read_text("utf-8")
    found = read(page.split("```toml")[1].split("```")[0])
    assert len(found.cells) == 24
    told = "layers" + str(found.cells[6].config.run_id).removeprefix("small")
    assert told == "layers.concepts-code.radius-7.0.seed-0.source_layer-8.target_layer-16"
    assert f"`{told}`" in page
