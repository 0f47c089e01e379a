"""`melbo-ray`: its commands, what it says of bad input and missing extras, and the wheel that people install."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import melbo_ray
from melbo_ray.__main__ import main
from melbo_ray.commands.registry import COMMANDS

ROOT = Path(__file__).parents[1]


def test_without_a_command_it_lists_all_of_them(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_every_command_is_a_module_and_has_help(capsys):
    files = {path.stem for path in (ROOT / "melbo_ray/commands").glob("*.py")} - {"__init__", "registry"}
    assert files == set(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: melbo-ray {name} ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["stauts"], "no command 'stauts': did you mean status?"),
        (["xyzzy"], "no command 'xyzzy': expected run, "),
        (["report"], "required: --run; melbo-ray report --help"),
        (["status", "/nowhere"], "no run at /nowhere"),
        (["status", "a", "b"], "unrecognized arguments: b"),
        (["plan", "--radiu", "3"], "did you mean --radius?"),
        (["evaluate", "--run", "r", "--sample", "few"], "invalid int value: 'few'"),
    ],
)
def test_bad_input_is_one_line_and_2(args, said, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def without(module):
    find = importlib.util.find_spec
    return lambda name, *rest: None if name == module else find(name, *rest)


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("run", "ray", "cluster"), ("evaluate", "s3fs", "cluster"), ("report", "plotly", "report")],
)
def test_a_missing_extra_is_one_line_and_2(command, module, extra, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", without(module))
    assert main([command, "--run", "anything"]) == 2
    said = f"error: melbo-ray {command} needs {module}: pip install 'melbo-ray[{extra}]'\n"
    assert capsys.readouterr().err == said


def test_a_run_without_plotly_ends_with_what_its_report_needs(monkeypatch):
    from melbo_ray.commands.run import report

    monkeypatch.setattr(importlib.util, "find_spec", without("plotly"))
    assert report("runs/r") == "melbo-ray report --run runs/r needs plotly: pip install 'melbo-ray[report]'"


def test_public_names_are_visible_to_type_checkers(tmp_path):
    """Each has its type, and an unknown name is an error."""
    assert sorted(melbo_ray.__all__) == sorted(melbo_ray._HOMES)
    file = tmp_path / "uses.py"
    names = ", ".join(melbo_ray.__all__)
    file.write_text(
        f"from melbo_ray import {names}\nx: int = Run('r').vectors('c')[1].norm\nfrom melbo_ray import Nope\n"
    )
    ty = [sys.executable, "-m", "ty", "check", "--python", sys.prefix, "--extra-search-path", str(ROOT), str(file)]
    said = subprocess.run([*ty, "--output-format", "concise"], capture_output=True, text=True, check=False).stdout
    assert [line.split(" ", 1)[1].split("]")[0] for line in said.splitlines() if "uses.py" in line] == [
        "error[invalid-assignment",
        "error[missing-module-member",
    ], said


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`melbo-ray` from a wheel, in an environment that has the dependencies and no repository; what runs it."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.startswith("melbo_ray/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), "./source"]
    subprocess.run([*pip, *build], cwd=folder, check=True)
    venv.create(folder / "venv", with_pip=False)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [
            *pip,
            "--python",
            str(folder / "venv/bin/python"),
            "install",
            "--ignore-installed",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
    )
    # The dependencies, after the wheel: a .pth file in a folder that another .pth file names is not read.
    (site,) = (folder / "venv/lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*args):
        command = [folder / "venv/bin/melbo-ray", *args]
        (folder / "elsewhere").mkdir(exist_ok=True)
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
        return subprocess.run(
            command, cwd=folder / "elsewhere", env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_the_wheel_has_the_command_and_its_data_outside_the_repository(installed, tmp_path):
    assert installed("--version").stdout == f"melbo-ray {importlib.metadata.version('melbo-ray')}\n"
    listed = installed("--help")
    assert (listed.returncode, "melbo-ray COMMAND" in listed.stdout) == (0, True)
    # A preset and a concept are read before the model is found missing.
    refused = installed("plan", "--config", "smollm2", "--model", str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert "cannot load the model" in refused.stderr
    assert str(ROOT) not in refused.stderr
