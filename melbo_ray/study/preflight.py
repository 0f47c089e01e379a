"""Checks of a configuration before anything is written or started, also against an existing run."""

import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from melbo_ray.cluster.memory import Demands, demands
from melbo_ray.concepts.loader import Concept, load_concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import resolve
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import load_config, pick_device
from melbo_ray.model.partial import reads_whole, sketch
from melbo_ray.model.products import require_products
from melbo_ray.model.residual_slice import check_layers
from melbo_ray.runs.manifest import Manifest, Rendered, RenderedPrompt
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit, covers, progress
from melbo_ray.search.given import check_given, seeks
from melbo_ray.search.power import require_float32
from melbo_ray.search.vector_io import SOUGHT

# Options that may change when a run resumes: storage, resources and evaluations.
_FREE = {
    "config", "run_id", "storage", "device", "evals", "sample", "eval_batch", "min_evaluators", "max_evaluators",
    "eval_gpus", "chain_gpus",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """A configuration that has passed all checks.

    Attributes:
        config: the options, with a run id and the evaluations by name.
        concepts: the concepts under study.
        demands: memory of the workers.
        rendered: every prompt by concept and name, as `text` in the model's chat template and as `tokens`.
        naming: " with --run-id …" if the command needs it to resume this run, else empty.
    """

    config: Config
    concepts: list[Concept]
    demands: Demands
    rendered: Rendered
    naming: str = ""


def check(config: Config, concepts: Sequence[Concept] = ()) -> Checked:
    """Check a configuration before anything is written or started.

    `concepts` replace those named in the configuration.

    Raises:
        UserError: the configuration cannot run.
    """
    concepts = list(concepts) or [load_concept(name) for name in config.concepts]
    if config.prompt is not None:
        concepts = [_trained_on(concept, config.prompt) for concept in concepts]
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--concepts is {','.join(config.concepts)!r}: expected at least one, each once")
    run_id = config.run_id or f"{'-'.join(names)}-{_slug(config.model)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", run_id):
        raise UserError(f"--run-id is {run_id!r}: expected letters, digits, and . _ - between them")
    evals = resolve(config.evals)
    if config.max_evaluators is not None and config.max_evaluators < config.min_evaluators:
        raise UserError(f"--max-evaluators {config.max_evaluators} is below --min-evaluators {config.min_evaluators}")
    if config.chain_gpus is not None and config.chain_gpus > 1:
        raise UserError(f"--chain-gpus is {config.chain_gpus:g}: a chain runs on one GPU, expected at most 1")
    if config.eval_gpus is not None and config.eval_gpus > 1 and (config.device == "cpu" or config.eval_gpus % 1):
        raise UserError(f"--eval-gpus is {config.eval_gpus:g}: above 1 whole GPUs are expected, and no --device cpu")
    _check_storage(config.storage)
    shape = sketch(config)
    if not os.environ.get("RAY_ADDRESS"):
        device = pick_device(config.device)
        require_products(config.eval_products, torch.device("cpu") if config.eval_gpus == 0 else device, shape.dtype)
    config = _at_depth(config, len(shape.layers))
    check_layers(config.source_layer, config.target_layer, len(shape.layers))
    if config.melbo_start == "power":
        require_float32(config.dtype)
    if config.num_vectors >= shape.d_model:
        raise UserError(
            f"--num-vectors is {config.num_vectors}: the model has d_model {shape.d_model}, so at most "
            f"{shape.d_model - 1} vectors are orthogonal to the base and each other"
        )
    _check_given(config, concepts, shape.d_model)
    for concept in concepts:
        tokens = shape.tokenize(concept.prompt, config.system_prompt)
        if seeks(config) and len(tokens) <= config.melbo_from:
            raise UserError(
                f"--melbo-from {config.melbo_from}: the prompt {_short(concept.prompt)} has only {len(tokens)} tokens, "
                "so none is left: give a longer prompt, or a smaller --melbo-from"
            )
        if len(tokens) <= config.z_from:
            raise UserError(
                f"--z-from {config.z_from}: the prompt {_short(concept.prompt)} has only {len(tokens)} tokens, so none "
                "is left: give a longer prompt, or a smaller --z-from"
            )
    published = load_config(config.model, config.revision, config.trust_remote_code).dtype
    needed = demands(shape, config, concepts, published, reads_whole(config))
    naming = "" if config.run_id else f" with --run-id {run_id}"
    rendered = _rendered(shape, config, concepts)
    named = config.model_copy(update={"run_id": run_id, "evals": evals})
    return Checked(named, concepts, needed, rendered, naming)


def _at_depth(config: Config, depth: int) -> Config:
    """The configuration with the layers at a third and two thirds of `depth`, if the default ones lie beyond it."""
    if config.target_layer < depth or config.model_fields_set & {"source_layer", "target_layer"}:
        return config
    return config.model_copy(update={"source_layer": depth // 3, "target_layer": 2 * depth // 3})


def prompts(concepts: Sequence[Concept]) -> dict[str, dict[str, str]]:
    """The texts of all prompts by concept and name."""
    return {concept.name: {"training": concept.prompt, **concept.held_out} for concept in concepts}


def _rendered(shape: LanguageModel, config: Config, concepts: Sequence[Concept]) -> Rendered:
    kept = shape.kept.setdefault("rendered", {})

    def of(prompt: str) -> RenderedPrompt:
        # Rendered once, because a template may insert the time.
        text = kept.setdefault((prompt, config.system_prompt), shape.rendered(prompt, config.system_prompt))
        return RenderedPrompt(text=text, tokens=shape.tokenize(prompt, config.system_prompt).tolist())

    return {concept: {name: of(text) for name, text in own.items()} for concept, own in prompts(concepts).items()}


def _trained_on(concept: Concept, prompt: str) -> Concept:
    """The concept with another training prompt, which is removed from the held-out prompts."""
    held_out = {name: text for name, text in concept.held_out.items() if text != prompt}
    return concept.model_copy(update={"prompt": prompt, "held_out": held_out})


def recheck(url: str, options: dict[str, Any]) -> Checked:
    """Check the configuration of the run at `url`, with `options` changed and their `evals` added.

    Raises:
        UserError: no run there, or an invalid option.
    """
    run = Run.open(url, patient=False)
    manifest = run.manifest()
    if manifest is None:
        raise UserError(f"no run at {run.storage.url}: expected run.json there")
    before = manifest.config
    asked = [name.strip() for name in options.pop("evals", "").split(",") if name.strip()]
    place: dict[str, Any] = {
        "evals": list(dict.fromkeys([*before["evals"], *asked])),
        "storage": run.storage.url.rpartition("/")[0],
    }
    try:
        config = Config(**(before | options | place))
        return check(config, [Concept(**definition) for definition in manifest.definitions.values()])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{'-'.join(map(str, first['loc'])).replace('_', '-')}: {first['msg']}") from None


def compare(manifest: Manifest, checked: Checked) -> None:
    """Compare a configuration with that of an existing run, whose chains must not become shorter than they are.

    Raises:
        UserError: the configurations differ; the message lists every difference.
    """
    # An option that the run's release did not have yet is at its default, which does what was done without it.
    before, options = recorded(Config()) | manifest.config, recorded(checked.config)
    found = max((outcome.vectors for outcome in manifest.concepts.values()), default=0)
    differences = [
        f"{name} was {_short(before.get(name))} and is {_short(options.get(name))}"
        for name in sorted({*before, *options} - _FREE)
        if before.get(name) != options.get(name) and not (name == "num_vectors" and options[name] >= found)
    ]
    differences += [
        f"{field} of concept {name} has changed"
        for name, concept in defined(checked.concepts).items()
        for field in concept
        if manifest.definitions.get(name, concept).get(field) != concept[field]
    ]
    if differences:
        raise UserError(
            f"run {checked.config.run_id!r} was begun with another configuration: {'; '.join(differences)}. "
            "Use the old one, or another --run-id"
        )


def recorded(config: Config) -> dict[str, Any]:
    """The options as stored in the manifest, with which a resumed run is compared."""
    return config.model_dump(mode="json", exclude={"config", "plan"})


def defined(concepts: Sequence[Concept]) -> dict[str, dict[str, Any]]:
    """The concepts as stored in the manifest, with which a resumed run is compared."""
    return {concept.name: concept.model_dump(mode="json") for concept in concepts}


def _check_given(config: Config, concepts: Sequence[Concept], d_model: int) -> None:
    """Raise if a base's vectors or those of `orthogonal_to` cannot be had, unless all are stored, or are too many."""
    named = ["base"] * (config.base not in SOUGHT) + ["orthogonal_to"] * (config.orthogonal_to is not None)
    try:
        taken = {name: max(check_given(config, concept, d_model, name) for concept in concepts) for name in named}
    except UserError:
        if not _has_bases(config, [concept.name for concept in concepts]):
            raise
        return
    most = d_model - 1 - taken.get("orthogonal_to", 0)
    if config.num_vectors > most:
        raise UserError(
            f"--num-vectors is {config.num_vectors}: beside the base and the directions of --orthogonal-to at most "
            f"{max(0, most)} are left of the model's d_model {d_model}"
        )


def _has_bases(config: Config, concepts: Sequence[str]) -> bool:
    if config.run_id is None:
        return False
    run = Run.open(f"{config.storage.rstrip('/')}/{config.run_id}", patient=False)
    manifest = run.manifest()
    if manifest is None:
        return False
    done = progress(manifest.done, run.fresh())
    return all(covers(done, Unit.base(concept)) for concept in concepts)


def _check_storage(url: str) -> None:
    if url.startswith("memory:"):
        raise UserError("--storage memory:// lives in one process, and a run has several: give a directory or a bucket")
    submitted = "working_dir_files" in Path.cwd().parts
    if submitted and "://" not in url and not Path(url).is_absolute():
        raise UserError(
            f"--storage is {url!r}: a submitted job runs in an unpacked copy that Ray deletes; give an absolute path "
            "on a shared file system, or a URL such as s3://bucket/prefix"
        )


def _slug(model: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.") or "model"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
