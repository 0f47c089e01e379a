"""The table in docs/parity.md: what other tools compute under a vector that was exported for them, beside melbo_ray.

python -m benchmarks.parity --run runs/RUN --index 1 --python ENVIRONMENT/bin/python,OTHER/bin/python

Each environment has some of the tools of `benchmarks/parity_peer.py`, which runs them there. A tool may stand in
several environments, with other versions of transformers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melbo_ray.formats.reading import read_vectors
from melbo_ray.formats.sidecar import Sidecar
from melbo_ray.formats.writing import FORMATS
from melbo_ray.model.hooks import steering
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import locate
from melbo_ray.study.export import export

PAGE = Path(__file__).parents[1] / "docs/parity.md"
MARKS = ("<!-- measured by benchmarks/parity.py -->", "<!-- end -->")
GREEDY = 32
"""Number of greedy tokens that are compared."""


def reference(model: LanguageModel, layer: int, theta: torch.Tensor, tokens: Sequence[int], count: int = GREEDY) -> Any:
    """melbo_ray's logits after the prompt, (vocab,) float32, and its greedy tokens under θ."""
    ids = torch.tensor([tokens])
    logits = []
    with torch.no_grad(), steering(model, layer, theta[None]):
        for _ in range(count):
            logits.append(model.network(ids, use_cache=False).logits[0, -1].float())
            ids = torch.cat([ids, logits[-1].argmax()[None, None]], 1)
    return logits[0].numpy(), ids[0, len(tokens) :].numpy()


def write_case(run: str, index: int, folder: Path, gguf: str | None = None, count: int = GREEDY) -> None:
    """Export the vector in every format into `folder`, with what melbo_ray computes under it.

    `gguf` is the GGUF file of the same model, on which llama.cpp is compared; the model's own folder is read by others.
    """
    files = {name: export(run, None, [index], name, str(folder))[0] for name in FORMATS}
    told = Sidecar.beside(str(files["npy"]))
    assert told is not None
    assert told.prompt is not None
    layer, tokens = told.site.layer, told.prompt.tokens
    saved, models = {}, {"model": locate(told.model.name)[0], "gguf": gguf}
    for kind, name in models.items():
        if name is not None:
            model = LanguageModel.load(name, device="cpu")
            theta = read_vectors(str(files["safetensors"]), model.d_model, layer)[0]
            saved[f"{kind}_logits"], saved[f"{kind}_greedy"] = reference(model, layer, theta, tokens, count)
            if kind == "gguf":
                zero = torch.zeros_like(theta)
                saved["unsteered_logits"], saved["unsteered_greedy"] = reference(model, layer, zero, tokens, count)
    np.savez(folder / "expected.npz", **saved)
    models["model"] = str(_for_every_release(Path(str(models["model"])), folder / "model"))
    named = {name: file.name for name, file in files.items()}
    (folder / "case.json").write_text(json.dumps({**models, "tokens": tokens, "layer": layer, "files": named}))


def _for_every_release(model: Path, place: Path) -> Path:
    """The model's folder for any release of transformers: those below 5 look for `rope_theta` in its former place.

    They ignore `rope_parameters`, and take 10,000 without a word.
    """
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).symlink_to(file.absolute())
    config = json.loads((model / "config.json").read_text("utf-8"))
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config.get("rope_parameters", {}) | config), "utf-8")
    return place


def measure(folder: Path, pythons: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of every environment, a tool with the same releases once."""
    script, rows = str(Path(__file__).with_name("parity_peer.py")), {}
    for python in pythons:
        ended = subprocess.run([python, script, str(folder)], capture_output=True, text=True, check=False)
        for row in (json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")):
            rows.setdefault((row["peer"], row["version"], row["transformers"]), row)
        if ended.returncode:
            raise SystemExit(ended.stderr)
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| tool | version | with transformers | file | largest difference of logits | same greedy tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        transformers = "–" if row["peer"].startswith("llama.cpp") else row["transformers"]
        found = [row["error"], "–"] if "error" in row else [f"{row['difference']:.1e}", f"{row['same']} of {row['of']}"]
        lines.append(f"| {' | '.join([row['peer'], row['version'], transformers, row['format'], *found])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run of one concept")
    parser.add_argument("--index", type=int, default=1, help="the vector")
    parser.add_argument("--gguf", help="GGUF file of the same model, for llama.cpp")
    parser.add_argument("--python", default=sys.executable, help="interpreters of the tools' environments, by commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_case(options.run, options.index, Path(folder), options.gguf)
        found = table(measure(Path(folder), options.python.split(",")))
    print(found)
    page = PAGE.read_text("utf-8")
    between = f"{MARKS[0]}\n\n{found}\n\n{MARKS[1]}"
    PAGE.write_text(re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _: between, page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
