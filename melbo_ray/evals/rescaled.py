"""KL of every vector at the chain's median norm, which separates falling norm from falling fidelity late in a chain."""

import statistics

from melbo_ray.evals.context import TRAINING, Rows, Study, Vectors
from melbo_ray.evals.kl import at_norm, next_token


def run(study: Study, chain: Vectors) -> Rows:
    """Write rows of `kl` at scale `median`."""
    norm = statistics.median(chain.norms)
    thetas = at_norm(chain.theta, norm)
    keys = {"prompt_id": TRAINING, "scale": "median", "norm": norm}
    return {
        "kl": [
            study.row(chain.kind, index, **keys, **columns)
            for index, columns in zip(chain.index, next_token(study, thetas), strict=True)
        ]
    }
