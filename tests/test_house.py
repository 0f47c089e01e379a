"""The house keeps its order: who may import whom, where Ray is, what the file map says of the files."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from melbo_ray.config import Config

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"errors"},
    {"config", "concepts", "host", "seeds"},
    {"model", "runs"},
    {"formats"},
    {"search"},
    {"evals", "report"},
    {"cluster", "play"},
    {"study"},
    {"cli"},
    {"commands"},
    {"__main__"},
    {"jobs", "benchmarks"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for folder in ("melbo_ray", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
RAY = {f"melbo_ray/cluster/{name}.py" for name in ("driver", "fleet", "member", "metrics", "pool", "session")}


def part_of(path):
    """The name on a floor that a file belongs to: its module or folder in melbo_ray, or its folder beside it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "melbo_ray" else parts[0]


def imported(path):
    """Everything a file imports, as dotted names, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(names):
    return {name.split(".")[1] for name in names if name.startswith("melbo_ray.") and name.count(".")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    here = part_of(path)
    if here == "__init__":
        return
    assert here in FLOOR, f"{here} stands on no floor: add it to FLOORS"
    for name in ours(imported(path)) - {here}:
        assert FLOOR[name] < FLOOR[here], f"{here} imports {name}, which is not below it"


def test_folders_are_one_deep_and_their_init_files_empty_of_logic():
    for path in (ROOT / "melbo_ray").glob("*/**/*.py"):
        assert len(path.relative_to(ROOT).parts) == 3, path
        if path.name == "__init__.py":
            body = ast.parse(path.read_text("utf-8")).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_within_a_folder_imports_have_no_circle():
    within = {}
    for path in (ROOT / "melbo_ray").glob("*/*.py"):
        home = f"melbo_ray.{path.parent.name}."
        named = {name[len(home) :].split(".")[0] for name in imported(path) if name.startswith(home)}
        within[home + path.stem] = {home + name for name in named}
    graphlib.TopologicalSorter(within).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_is_in_one_place(path):
    if str(path.relative_to(ROOT)) in RAY or part_of(path) == "jobs":
        return
    assert not {name for name in imported(path) if name.split(".")[0] == "ray"}


def flags_raised(path):
    """The command line's flags in what a file's `raise` statements say."""
    raised = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise)]
    texts = [node.value for each in raised for node in ast.walk(each) if isinstance(node, ast.Constant)]
    named = {name for text in texts if isinstance(text, str) for name in re.findall(r"--([a-z][a-z-]*)", text)}
    return named & {name.replace("_", "-") for name in Config.model_fields}


def test_errors_of_what_a_notebook_uses_name_parameters_and_no_flags():
    below = {name for floor in FLOORS[: FLOOR["study"]] for name in floor}
    assert not {str(path) for path in MODULES if part_of(path) in below and flags_raised(path)}


def test_the_guards_above_can_fail(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    raise ValueError(f'give {1} --eval-gpus')\n")
    assert flags_raised(file) == {"eval-gpus"}
    file.write_text("def f():\n    import ray.util\n    from melbo_ray.cluster.driver import Driver\n")
    assert {name.split(".")[0] for name in imported(file)} >= {"ray"}
    assert ours(imported(file)) == {"cluster"}


def test_the_notebook_part_loads_without_ray_and_s3fs():
    below = {name for floor in FLOORS[: FLOOR["cluster"]] for name in floor}
    files = [path.relative_to(ROOT) for path in MODULES if part_of(path) in below]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    code = f"import sys; sys.modules['ray'] = sys.modules['s3fs'] = None\nfor name in {names}: __import__(name)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_reads_a_run_loads_without_torch():
    below = {name for floor in FLOORS[:2] for name in floor} | {"runs", "report"}
    files = [path.relative_to(ROOT) for path in MODULES if part_of(path) in below]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    code = f"import sys; sys.modules['torch'] = None\nfor name in {names}: __import__(name)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_file_map_is_the_folder_listing():
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    block = page.split("```")[1]
    told = set(re.findall(r"^(\S+\.\w+|\S+/|Makefile|LICENSE)\s", block, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {
        name for name in tracked if re.fullmatch(r"(melbo_ray|jobs|benchmarks)/.*\.py", name) and "__init__" not in name
    }
    code -= {name for name in code if name.startswith(("melbo_ray/concepts/", "melbo_ray/evals/"))}
    code |= {name for name in tracked if "/" not in name and not name.startswith(".")}
    folders = {"concepts", "evals", "play/page", "report/templates"}
    assert told == code | {"tests/", "docs/", *(f"melbo_ray/{name}/" for name in folders)}


def test_every_file_is_short_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): n for path in MODULES if (n := len(path.read_text("utf-8").splitlines())) > 260
    }
    assert not long


def test_where_it_does_not_run_it_says_so():
    code = "import sys; sys.platform = 'win32'; import melbo_ray"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].endswith("runs on Linux and macOS; on Windows use it inside WSL 2")
