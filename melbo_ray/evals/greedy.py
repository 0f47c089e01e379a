"""The greedy text under each vector, which is generated for the whole chain even if others are sampled."""

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.generations import rows_of_texts


def run(study: Study, vectors: Vectors) -> Rows:
    """Generate the greedy continuation of the training prompt, each vector at its own norm."""
    study = study.rounded
    keys = [{"index": index, "prompt_id": TRAINING, "scale": "own", "sample": 0} for index in vectors.index]
    return rows_of_texts(study, vectors.kind, keys, list(vectors.theta))
