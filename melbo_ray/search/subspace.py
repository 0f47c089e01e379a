"""The subspace spanned by the vectors of a chain, and projections onto its complement."""

import torch
from jaxtyping import Float
from torch import Tensor

# Enough for 64 rows with |cos| up to a half: small singular values grow by half a step, then converge quadratically.
_SCHULZ_STEPS = 24


class Subspace:
    """The span of the added vectors, with an orthonormal basis.

    The basis is extended by Gram-Schmidt, applied twice in float64 (Giraud, Langou and Rozložník 2005, "twice is
    enough"), with a float32 copy for the projections of the inner loop.

    Args:
        d_model: dimension of the space.
        capacity: maximum number of vectors, at most d_model.
        device: device of both, on which everything is computed.
    """

    def __init__(self, d_model: int, capacity: int, device: torch.device | str = "cpu") -> None:
        if not 0 < capacity <= d_model:
            raise ValueError(f"capacity is {capacity}; expected 1 to d_model = {d_model}")
        self._exact = torch.zeros(capacity, d_model, dtype=torch.float64, device=device)
        self._basis = torch.zeros(capacity, d_model, device=device)
        self.size = 0

    @property
    def basis(self) -> Float[Tensor, "size d_model"]:
        """Orthonormal rows, float32."""
        return self._basis[: self.size]

    def remove(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The part of each vector orthogonal to the span, float32, on the vectors' device."""
        rest = vectors.to(self._basis)
        for _ in range(2):
            rest = rest - (rest @ self.basis.T) @ self.basis
        return rest.to(vectors.device)

    def remove_exact(self, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """Like `remove`, in float64 on the subspace's device, for vectors that are stored."""
        exact, basis = vector.to(self._exact), self._exact[: self.size]
        for _ in range(2):
            exact = exact - (exact @ basis.T) @ basis
        return exact

    def add(self, vector: Float[Tensor, " d_model"]) -> float:
        """Extend the span by `vector`; returns its largest |cos| with any earlier direction.

        Raises:
            ValueError: the vector is zero or not finite, lies in the span, or the subspace is full.
        """
        if self.size == len(self._exact):
            raise ValueError(f"the subspace is full: it was made for {self.size} vectors")
        unit = vector.to(self._exact)
        norm = unit.norm()
        if not torch.isfinite(norm) or norm == 0:
            raise ValueError(f"a direction needs a finite norm above 0; got {norm:g}")
        unit = unit / norm
        cosines = self._exact[: self.size] @ unit
        rest = self.remove_exact(unit)
        if rest.norm() < 1e-3:
            raise ValueError("the vector lies within the span of the earlier ones")
        self._exact[self.size] = rest / rest.norm()
        self._basis[self.size] = self._exact[self.size].to(self._basis)
        self.size += 1
        return float(cosines.abs().max()) if len(cosines) else 0.0


def disentangle(vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Vectors of the same norms along the nearest orthonormal directions; differentiable, in float64.

    This is symmetric orthonormalisation (Löwdin 1950), which treats all rows alike: the orthogonal polar factor of the
    directions, computed by Newton-Schulz iteration. The rows must be linearly independent.
    """
    norms = vectors.double().norm(dim=-1, keepdim=True)
    units = vectors.double() / norms
    # The iteration converges for singular values below √3; those of n unit vectors are at most √n.
    factor = units / len(units) ** 0.5
    for _ in range(_SCHULZ_STEPS):
        factor = 1.5 * factor - 0.5 * (factor @ factor.T) @ factor
    return norms * factor


def max_abs_cos(vectors: Float[Tensor, "n d_model"]) -> float:
    """The largest |cos| between two different rows, from the complete Gram matrix in float64; 0 for one row."""
    units = torch.nn.functional.normalize(vectors.to("cpu", torch.float64), dim=-1)
    return float((units @ units.T).fill_diagonal_(0).abs().max())
