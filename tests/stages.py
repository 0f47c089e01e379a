"""A run of a tiny model in storage, with vectors of the model's own width, for what steers with them."""

import json
from pathlib import Path

from melbo_ray.model.language_model import LanguageModel
from melbo_ray.play.stage import Stage
from melbo_ray.runs.run_store import Run
from tests.families import directions, tiny
from tests.studies import write_part, write_study

LAYER = 1


def write_run(folder: Path, concepts: tuple[str, ...] = ("code",), num_vectors: int = 4) -> Path:
    """A run whose vectors are random directions of norms 3, 4, 5, …; the base has index 0."""
    run = write_study(folder, concepts=concepts, num_vectors=num_vectors, without=("vectors",))
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"] |= {"source_layer": LAYER, "target_layer": 3, "dtype": "float32"}
    manifest["fingerprint"] = None
    (run / "run.json").write_text(json.dumps(manifest))
    for seed, concept in enumerate(concepts):
        thetas = directions(num_vectors + 1, norm=1.0, seed=seed)
        kinds = ["base", *["chain"] * num_vectors]
        rows = [
            {"kind": kind, "index": i, "norm": 3.0 + i, "vector": ((3 + i) * theta).tolist()}
            for i, (kind, theta) in enumerate(zip(kinds, thetas, strict=True))
        ]
        write_part(run, "vectors", concept, rows)
    return run


def stage(run: Path, model: LanguageModel | None = None) -> Stage:
    """The run on a tiny model."""
    stored = Run(run)
    manifest = stored.manifest()
    assert manifest is not None
    vectors = {concept: stored.vectors(concept) for concept in manifest.concepts}
    return Stage(str(run), manifest, model or tiny(), vectors)
