"""Falling norm and falling fidelity are confounded late in a chain: every vector at the chain's own median norm."""

import statistics

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.kl import at_norm, next_token


def run(study: Study, chain: Vectors) -> Rows:
    """Rows of `kl` at scale `median`."""
    norm = statistics.median(chain.norms)
    thetas = at_norm(chain.theta, norm)
    keys = {"prompt_id": TRAINING, "scale": "median", "norm": norm}
    return {
        "kl": [
            study.row(chain.kind, index, **keys, **columns)
            for index, columns in zip(chain.index, next_token(study, thetas), strict=True)
        ]
    }
