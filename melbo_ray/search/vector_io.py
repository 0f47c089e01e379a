"""The vectors that an option names: a file of them, or vectors of another run."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.formats.reading import READERS, read_vectors
from melbo_ray.formats.sidecar import Sidecar
from melbo_ray.runs.run_store import Run
from melbo_ray.search.vectors import stored_vectors

COMPUTED = ("melbo", "promotion", "contrast", "power")
"""The bases that are computed from the model and the concept alone."""
PAIRS = ".jsonl"
"""Suffix of a file of pairs of prompts, from which a base is computed."""


def names_vectors(base: str) -> bool:
    """Whether the option `base` names vectors that exist, which keep their norms; otherwise they are computed."""
    return base not in COMPUTED and Path(base).suffix != PAIRS


def named_vectors(name: str, d_model: int, layer: int, option: str = "base") -> Float[Tensor, "n d_model"]:
    """The vectors that `name` means, float32, for use at layer `layer`.

    Args:
        name: path of a file (`read_vectors`), or `URL#concept/index`, a vector of the run at URL; index 0 is its base.
        d_model: width of the residual stream.
        layer: layer to whose output they are to be added.
        option: the option that names them, for errors.

    Raises:
        UserError: no such file, run or vector, or one of another width or layer.
    """
    if "#" in name and not Path(name).is_file():
        return _of_run(name, d_model, layer)
    if Path(name).suffix not in READERS:
        others = f"{', '.join(COMPUTED)}, pairs ({PAIRS}), " if option == "base" else ""
        raise UserError(
            f"`{option}` is {name!r}: expected {others}a file of vectors ({', '.join(READERS)}), or URL#concept/index"
        )
    told = Sidecar.beside(name)
    if told is not None and told.site.layer != layer:
        raise UserError(f"{name!r} is for layer {told.site.layer} by its sidecar: choose that as `source_layer`")
    return read_vectors(name, d_model, layer)


def _of_run(name: str, d_model: int, layer: int) -> Float[Tensor, "1 d_model"]:
    url, _, place = name.rpartition("#")
    concept, _, index = place.partition("/")
    if not index.isascii() or not index.isdigit():
        raise UserError(f"{name!r} is no vector of a run: expected URL#concept/index, such as runs/RUN#code/129")
    run = Run.open(url, patient=False)
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
    found = {vector.index: vector.theta for vector in stored.chain}
    if stored.base is not None:
        found[0] = stored.base.theta
    if int(index) not in found:
        raise UserError(f"{concept} of the run at {url} has no vector {index}: it has {len(found)}, from 0 (the base)")
    theta = found[int(index)]
    if len(theta) != d_model:
        raise UserError(f"the vectors of {url} have {len(theta)} entries, the model's d_model is {d_model}")
    return theta[None]
