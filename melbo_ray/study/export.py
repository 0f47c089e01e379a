"""Writing vectors of a run as files for other tools, each with a sidecar that says what they are and should do."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch

from melbo_ray.config import ModelOptions
from melbo_ray.errors import UserError
from melbo_ray.formats import sidecar, writing
from melbo_ray.formats.sidecar import Expected, Exported, Sidecar, Site
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.partial import sketch
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.search.vectors import stored_vectors


def export(run: str, concept: str | None, indices: Sequence[int], format: str, out: str) -> list[Path]:
    """Write vectors of a run into the folder `out`; returns the files, without their sidecars.

    Args:
        run: folder of the run, a directory or fsspec URL.
        concept: name of the concept; may be None in a run of one concept.
        indices: the vectors: 0 is the base, the chain counts from 1.
        format: a name in `writing.FORMATS`.
        out: directory, made if it is not there. Files of the same names are replaced.

    Raises:
        UserError: no such run, concept, vector or format, or a layer that the format cannot name; nothing is written.
    """
    stored = Run.open(run, patient=False)
    manifest = manifest_of(stored)
    options = model_options(manifest)
    of = writing.of(format, options.source_layer)
    name = concept_of(manifest, concept)
    source = _Source(manifest, name, options, sketch(options), _vectors(stored, name, indices))
    groups = [source.vectors] if of.many else [[vector] for vector in source.vectors]
    with tempfile.TemporaryDirectory() as folder:
        files = [_write(source, group, format, Path(folder)) for group in groups]
        place = Path(out)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(folder).iterdir()):
                shutil.move(path, place / path.name)
        except OSError as error:
            raise UserError(f"cannot write to {out!r}: {error.strerror}") from None
    return [place / file.name for file in files]


def numbers(text: str) -> list[int]:
    """The indices in a text such as `1-24` or `0,3,7-9`, each once, in order.

    Raises:
        UserError: another form.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?\s*", part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise UserError(f"the index {text!r}: expected numbers and spans, such as 0,3,7-9")
        found |= dict.fromkeys(range(int(span[1]), int(span[2] or span[1]) + 1))
    return list(found)


def manifest_of(run: Run) -> Manifest:
    """The manifest of a run that is there.

    Raises:
        UserError: no run, or another schema version.
    """
    manifest = run.manifest()
    if manifest is None:
        raise UserError(f"no run at {run.storage.url}: expected run.json there")
    return manifest


def concept_of(manifest: Manifest, concept: str | None) -> str:
    """The concept, by default the run's only one.

    Raises:
        UserError: the run has no such concept, or several and none is named.
    """
    names = list(manifest.definitions)
    if concept is None and len(names) == 1:
        return names[0]
    if concept not in names:
        raise UserError(f"the concept {concept!r}: the run {manifest.run_id} has {', '.join(names) or 'none'}")
    return concept


def model_options(manifest: Manifest) -> ModelOptions:
    """The options of the run's model."""
    return ModelOptions(
        **{name: manifest.config[name] for name in ModelOptions.model_fields if name in manifest.config}
    )


@dataclass(frozen=True)
class _Vector:
    theta: torch.Tensor
    exported: Exported


@dataclass(frozen=True)
class _Source:
    """What is exported, and what is said of it."""

    manifest: Manifest
    concept: str
    options: ModelOptions
    shape: LanguageModel
    vectors: list[_Vector]


def _vectors(run: Run, concept: str, indices: Sequence[int]) -> list[_Vector]:
    stored = stored_vectors(run, concept)
    thetas = {vector.index: vector.theta for vector in stored.chain}
    if stored.base is not None:
        thetas[0] = stored.base.theta
    if missing := [index for index in indices if index not in thetas]:
        raise UserError(f"{concept} has no vector {missing[0]}: the run has {len(thetas)}, from 0 (the base)")
    if not indices:
        raise UserError("no index is given: expected at least one")
    kl = run.read("kl", concept)
    own = kl.filter((pc.field("scale") == "own") & pc.field("kind").isin(["base", "chain"])).to_pylist()
    told = {row["index"]: Expected(**{name: row[name] for name in Expected.model_fields}) for row in own}
    return [
        _Vector(thetas[index], Exported(index=index, norm=float(thetas[index].norm()), expected=told.get(index)))
        for index in indices
    ]


def _write(source: _Source, group: list[_Vector], format: str, folder: Path) -> Path:
    """Write a file and its sidecar."""
    of, layer, network = writing.of(format, source.options.source_layer), source.options.source_layer, source.shape
    module = _name(network.network, network.layers[layer])
    spans = [str(vector.exported.index) for vector in (group[0], group[-1])]
    stem = f"{source.concept}-{'-'.join(dict.fromkeys(spans))}"
    path = folder / f"{stem}{of.suffix}"
    family = network.network.config.model_type
    about = f"{source.manifest.run_id}, {source.concept} {'-'.join(dict.fromkeys(spans))}, added after layer {layer}"
    rows = torch.stack([vector.theta for vector in group])
    hookpoint = _name(network.network.base_model, network.layers[layer])
    of.write(path, writing.Written(rows, layer, family, hookpoint, about))
    rendered = source.manifest.prompts_rendered.get(source.concept, {}).get("training")
    site = Site(layer=layer, module=module, hidden_states=layer + 1, hook=f"blocks.{layer}.hook_resid_post")
    said = Sidecar(
        format=format,
        run_id=source.manifest.run_id,
        concept=source.concept,
        site=site,
        model=_model(source),
        prompt=None if rendered is None else sidecar.Prompt(text=rendered.text, tokens=rendered.tokens),
        vectors=[vector.exported for vector in group],
        use=writing.use_of(of, path.name, layer, module),
    )
    path.with_name(path.name + sidecar.SUFFIX).write_text(said.encode(), "utf-8")
    return path


def _model(source: _Source) -> sidecar.Model:
    options, shape = source.options, source.shape
    return sidecar.Model(
        name=options.model, revision=options.revision, dtype=options.dtype, model_type=shape.network.config.model_type,
        d_model=shape.d_model, num_layers=len(shape.layers), fingerprint=source.manifest.fingerprint,
    )  # fmt: skip


def _name(network: torch.nn.Module, layer: torch.nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is layer)
