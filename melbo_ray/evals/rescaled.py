"""KL of every vector at the chain's median norm, which separates falling norm from falling fidelity late in a chain."""

from collections.abc import Sequence

from melbo_ray.evals.context import TRAINING, Chain, Rows, Study
from melbo_ray.evals.kl import at_norm, next_token


def run(study: Study, chain: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write rows of `kl` at scale `median` for the vectors with the indices `items`."""
    study = study.rounded
    vectors, norm = chain.vectors.at(items), chain.median_norm
    keys = {"prompt_id": TRAINING, "scale": "median", "norm": norm}
    columns = next_token(study, at_norm(vectors.theta, norm)) if len(vectors) else []
    return {"kl": [study.row("chain", i, **keys, **own) for i, own in zip(vectors.index, columns, strict=True)]}
