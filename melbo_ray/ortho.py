"""One steering vector (the solver), and the chain as a generator of vectors (MELBO-ortho)."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SteeringVector:
    """A vector of the chain with its certificate.

    Attributes:
        index: position in the chain, from 1; the base is 0.
        theta: (d_model,) float32 on the CPU.
        norm: ‖θ‖ (residual-stream units).
        loss: ‖z(θ) − z(θ₀)‖ (residual-stream units), without the norm penalty.
        relative_loss: loss / ‖z(0) − z(θ₀)‖.
        evaluations: value-and-gradient evaluations it took.
        stop_reason: `converged`, `max_evaluations`, `line_search`.
        max_abs_cos: largest |cos| with θ₀ and every earlier vector, float64.
        seconds: wall time it took.
        seed: seed of its random start.
    """

    index: int
    theta: Float[Tensor, " d_model"]
    norm: float
    loss: float
    relative_loss: float
    evaluations: int
    stop_reason: str
    max_abs_cos: float
    seconds: float
    seed: int


def derive_seed(seed: int, concept: str, index: int, purpose: str) -> int:
    """A seed of 63 bits from (seed, concept, index, purpose), so that each draw can be repeated alone."""
    digest = hashlib.sha256(f"{seed}/{concept}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
