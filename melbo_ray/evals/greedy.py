"""The likeliest text under each vector: what long chains ask of all."""

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.generations import rows_of_texts


def run(study: Study, vectors: Vectors) -> Rows:
    """The likeliest continuation of the training prompt, each vector at its own norm."""
    keys = [{"index": index, "prompt_id": TRAINING, "scale": "own", "sample": 0} for index in vectors.index]
    return rows_of_texts(study, vectors.kind, keys, list(vectors.theta))
