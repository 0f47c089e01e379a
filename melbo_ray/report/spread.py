"""How much vectors differ from each other: their participation ratio, and what is left of the differences they had."""

import math

import numpy as np
from jaxtyping import Float


def participation(vectors: Float[np.ndarray, "n d_model"]) -> float:
    """Participation ratio (Σλ)² / Σλ² of the unit vectors' Gram matrix: 1 if all are parallel, n if orthogonal."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = (vectors / np.where(norms > 0, norms, 1))[norms[:, 0] > 0].astype(np.float64)
    return float(len(units) ** 2 / np.square(units @ units.T).sum()) if len(units) else math.nan


def alignment(one: Float[np.ndarray, "n d_one"], other: Float[np.ndarray, "n d_other"]) -> float:
    """Linear centred kernel alignment of the same n vectors at two places: 1 if they differ alike in both.

    ⟨K, L⟩ / (‖K‖ ‖L‖) of the two Gram matrices, centred over n (Kornblith et al. 2019, "Similarity of neural network
    representations revisited"); 0 if at one place all vectors are the same. If those at one place are orthogonal
    and of one norm, it is √(P / (n − 1)) with P the participation ratio of the other's differences from their mean.
    """
    first, second = (_centred(vectors) for vectors in (one, other))
    sizes = np.linalg.norm(first) * np.linalg.norm(second)
    return float((first * second).sum() / sizes) if sizes > 0 else 0.0


def _centred(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    return centred @ centred.T
