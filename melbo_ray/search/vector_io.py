"""The vectors that an option names: a file of them, or vectors of another run."""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.formats.reading import READERS, read_vectors
from melbo_ray.formats.sidecar import Sidecar
from melbo_ray.runs.run_store import Run
from melbo_ray.search.vectors import stored_vectors

COMPUTED = ("melbo", "promotion", "contrast", "power")
"""The names of vectors that are computed from the model and the concept alone; `power` may have a number."""
SOUGHT = ("melbo", "promotion")
"""Those of them that only a search for a base finds."""
PAIRS = ".jsonl"
"""Suffix of a file of pairs of prompts, from which a vector is computed."""
_NAME = "URL#concept/index (or /mean, or no / for all)"


def names_vectors(name: str) -> bool:
    """Whether the name is of vectors that exist, which keep their norms; otherwise they are computed."""
    return name not in COMPUTED and leading(name) is None and Path(name).suffix != PAIRS


def leading(name: str) -> int | None:
    """The number n of `power/n`; None for another name."""
    found = re.fullmatch(r"power/([1-9]\d{0,5})", name)
    return int(found[1]) if found else None


def run_named(name: str | None) -> str | None:
    """The URL of the run whose vectors the name means; None if it means others."""
    if name is None or "#" not in name or Path(name).is_file():
        return None
    return name.rpartition("#")[0]


def named_vectors(
    name: str, d_model: int, layer: int, option: str = "base", concept: str = ""
) -> Float[Tensor, "n d_model"]:
    """The vectors that `name` means, float32, for use at layer `layer`.

    Args:
        name: path of a file (`read_vectors`), or vectors of the run at URL: `URL#concept/index` (0 is the base),
            `URL#concept/mean` (the mean of its chain), or `URL#concept` (the base and the chain).
        d_model: width of the residual stream.
        layer: layer to whose output they are to be added.
        option: the option that names them, for errors.
        concept: the concept that is meant where the name has none (`URL#/index`).

    Raises:
        UserError: no such file, run or vector, or one of another width or layer.
    """
    if run_named(name) is not None:
        return _of_run(name, d_model, layer, concept)
    if Path(name).suffix not in READERS:
        others = ", ".join(COMPUTED if option == "base" else ("contrast", "power/16"))
        raise UserError(
            f"`{option}` is {name!r}: expected {others}, pairs ({PAIRS}), a file of vectors ({', '.join(READERS)}), or "
            f"{_NAME}"
        )
    told = Sidecar.beside(name)
    if told is not None and told.site.layer != layer:
        raise UserError(f"{name!r} is for layer {told.site.layer} by its sidecar: choose that as `source_layer`")
    return read_vectors(name, d_model, layer)


def _of_run(name: str, d_model: int, layer: int, concept: str) -> Float[Tensor, "n d_model"]:
    url, _, place = name.rpartition("#")
    given, _, which = place.partition("/")
    if which not in ("", "mean") and not re.fullmatch(r"[0-9]+", which):
        raise UserError(f"{name!r} is no vector of a run: expected {_NAME}, such as runs/RUN#code/129")
    concept, run = given or concept, Run.open(url, patient=False)
    manifest = run.manifest()
    if manifest is None:
        raise UserError(f"no run at {run.storage.url}: expected run.json there")
    if concept not in manifest.definitions:
        raise UserError(f"the run at {url} has no concept {concept!r}: expected {', '.join(manifest.definitions)}")
    if manifest.config.get("source_layer") != layer:
        raise UserError(
            f"the vectors of {url} are for layer {manifest.config.get('source_layer')}: choose that as `source_layer`"
        )
    stored = stored_vectors(run, concept)
    base, chain = stored.base, {vector.index: vector.theta for vector in stored.chain}
    found = chain if base is None else {0: base.theta, **chain}
    if (which == "mean" and not chain) or (which not in ("", "mean") and int(which) not in found) or not found:
        lacking = f"vector {which}" if which.isdigit() else "chain" if found else "vector yet"
        raise UserError(f"{concept} of the run at {url} has no {lacking}: it has {len(found)}, from 0 (the base)")
    if which == "mean":
        thetas = torch.stack([*chain.values()]).double().mean(0, keepdim=True).float()
    else:
        thetas = torch.stack([*found.values()] if not which else [found[int(which)]])
    if thetas.shape[1] != d_model:
        raise UserError(f"the vectors of {url} have {thetas.shape[1]} entries, the model's d_model is {d_model}")
    return thetas
