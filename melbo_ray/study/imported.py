"""Making a run of a foreign chain, so that every evaluation can be run on it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.formats.sidecar import Sidecar
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.partial import lower_fingerprint
from melbo_ray.model.residual_slice import Slice
from melbo_ray.runs import schema
from melbo_ray.runs.manifest import Manifest, Outcome
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit, part_number
from melbo_ray.search.sink import target_shares
from melbo_ray.search.vector_io import named_vectors, names_vectors
from melbo_ray.search.vectors import BaseVector, SteeringVector, row
from melbo_ray.study.preflight import Checked, check
from melbo_ray.study.runner import new_manifest

IMPORTED = "imported"
"""`stop_reason` of vectors that were not found here, and of their chain."""


def import_run(config: Config) -> Run:
    """Store the vectors that `config.base` names as base and chain of a new run, without evaluations.

    The base is row `base_index`, by default the first, as in the reference repository's files; the other rows are the
    chain, in order, at their own norms and as they are, orthogonal or not: `max_abs_cos` says how far. The certificates
    are computed on the model with one concept's prompt, at the configuration's layers.

    Raises:
        UserError: several concepts, a base that is no file or run, a vector of norm 0, another model than the file's
            sidecar says, or a run of this name that exists.
    """
    if not names_vectors(config.base):
        raise UserError(f"--base is {config.base!r}: expected a file of vectors, or URL#concept")
    options = config.model_copy(update={"evals": [], "num_vectors": 1})
    checked = check(options)
    config = checked.config
    if len(checked.concepts) != 1:
        raise UserError(f"--concepts has {len(checked.concepts)}: the vectors of a file belong to one")
    model = LanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device,
        trust_remote_code=config.trust_remote_code, layers=config.layers,
    )  # fmt: skip
    vectors = named_vectors(config.base, model.d_model, config.source_layer, concept=checked.concepts[0].name)
    _check(vectors, config, model)
    first = config.base_index or 0
    base, chain = vectors[first], torch.cat([vectors[:first], vectors[first + 1 :]])
    if len(chain):
        checked = check(options.model_copy(update={"num_vectors": len(chain), "run_id": checked.config.run_id}))
    return _store(checked, model, base, chain)


def _check(vectors: Float[Tensor, "n d_model"], config: Config, model: LanguageModel) -> None:
    if (config.base_index or 0) >= len(vectors):
        raise UserError(f"--base-index is {config.base_index}: {config.base!r} has {len(vectors)} vectors, from 0")
    if not (vectors.norm(dim=-1) > 0).all():
        raise UserError(f"{config.base!r} has a vector of norm 0: leave it out")
    told = Sidecar.beside(config.base)
    if told is not None and told.model.fingerprint not in (None, model.fingerprint()):
        raise UserError(
            f"{config.base!r} is of {told.model.name} ({told.model.dtype}), and {model.name} ({config.dtype}) has "
            "another fingerprint: give that model, or remove the sidecar to use the vectors on this one"
        )


def _store(checked: Checked, model: LanguageModel, base: Tensor, chain: Tensor) -> Run:
    """Write the run: its manifest first, which fails if another has it."""
    config, (concept,) = checked.config, checked.concepts
    run = Run.open(f"{config.storage.rstrip('/')}/{config.run_id}")
    if run.manifest() is not None:
        raise UserError(f"there is a run {config.run_id!r} in {config.storage} already: give another --run-id")
    slice = Slice(
        model, [model.tokenize(concept.prompt, config.system_prompt)], config.source_layer, config.target_layer
    )
    found = certified(slice, base, chain, config.z_from)
    manifest: Manifest = new_manifest(checked)
    manifest.fingerprint = model.fingerprint()
    manifest.lower_fingerprint = lower_fingerprint(model, config.target_layer + 1)
    manifest.concepts[concept.name] = Outcome(vectors=len(found), stop_reason=IMPORTED)
    manifest.status = "interrupted"
    run.write_manifest(manifest)
    name = str(config.run_id)
    facts = {"run_id": name, "kind": "base", "index": 0}
    figures = {"radius": float(base.norm()), **target_shares(slice, base)}
    written = {
        "vectors": schema.table("vectors", [row(name, "base", BaseVector(base))]),
        "summary": schema.table("summary", [facts | {"figure": k, "value": v} for k, v in figures.items()]),
    }
    run.commit(Unit.base(concept.name), written)
    for part in _by_part(found):
        rows = schema.table("vectors", [row(name, "chain", vector) for vector in part])
        run.commit(Unit(concept.name, "chain", "chain", part[0].index, part[-1].index), {"vectors": rows})
    run.publish(manifest, lambda: None)
    return run


def _by_part(vectors: Sequence[SteeringVector]) -> list[list[SteeringVector]]:
    parts: dict[int, list[SteeringVector]] = {}
    for vector in vectors:
        parts.setdefault(part_number(vector.index), []).append(vector)
    return list(parts.values())


@torch.no_grad()
def certified(
    slice: Slice, base: Float[Tensor, " d_model"], chain: Float[Tensor, "n d_model"], z_from: int
) -> list[SteeringVector]:
    """The chain's vectors with their losses and cosines; no search is certified, so `evaluations` and `seconds` are 0.

    Raises:
        UserError: the base changes nothing, or a loss is not finite.
    """
    length, d_model = slice.h_source.shape[1], slice.model.d_model
    rows = torch.cat([torch.zeros(1, d_model), base[None], chain])
    starts = [z_from, *range(min(2, length))]
    means: list[Tensor] = []
    for part in rows.split(slice.rows_at_once):
        h = slice.h_target(part.to(slice.model.device))
        means.append(torch.stack([slice.mean(h, None, start) for start in starts], 1).cpu())
    z = torch.cat(means)
    losses = (z - z[1]).norm(dim=-1)
    if not torch.isfinite(losses).all() or not (losses[0] > 0).all():
        raise UserError("the base changes nothing at the target layer, or a loss is not finite: choose another base")
    units = torch.nn.functional.normalize(rows[1:].double(), dim=-1)
    cosines = (units @ units.T).abs().tril(-1)
    found = []
    for index, theta in enumerate(chain, 1):
        own = losses[index + 1]
        relative = (own / losses[0]).tolist()
        found.append(
            SteeringVector(
                index=index,
                theta=theta,
                norm=float(theta.norm()),
                loss=float(own[0]),
                relative_loss=relative[0],
                relative_loss_from_0=relative[1],
                relative_loss_from_1=relative[2] if len(relative) > 2 else None,
                evaluations=0,
                stop_reason=IMPORTED,
                max_abs_cos=float(cosines[index].max()),
                seconds=0.0,
                seed=0,
            )
        )
    return found
