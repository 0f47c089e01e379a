"""The subspace spanned by the vectors of a chain, and projections onto its complement."""

import torch
from jaxtyping import Float
from torch import Tensor

# Enough for 64 rows with |cos| up to a half: small singular values grow by half a step, then converge quadratically.
_SCHULZ_STEPS = 24
_BLOCK = 64
_GRAM_ROWS = 512
_LEAST_REST = 1e-3
_WITHIN = "the vector lies within the span of the earlier ones"


class Subspace:
    """The span of the added vectors, with an orthonormal basis.

    The basis is extended by Gram-Schmidt, applied twice in float64 (Giraud, Langou and Rozložník 2005, "twice is
    enough"), with a float32 copy for the projections of the inner loop. Every 64 vectors their rows are computed anew
    as a block, by matrix products and QR, from the vectors alone. So a basis of many vectors takes no pass over all
    rows for each (`extend`), and equals to the bit that of the same vectors added one by one (`add`).

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
        # Unit vectors in the directions added since the last whole block.
        self._open = torch.zeros(_BLOCK, d_model, dtype=torch.float64, device=device)
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
        return _remove(vector.to(self._exact), self._exact[: self.size])

    def add(self, vector: Float[Tensor, " d_model"]) -> float:
        """Extend the span by `vector`; returns its largest |cos| with any earlier direction.

        Raises:
            ValueError: the vector is zero or not finite, lies in the span, or the subspace is full.
        """
        unit = self._units(vector[None])[0]
        cosines = self._exact[: self.size] @ unit
        rest = self.remove_exact(unit)
        if rest.norm() < _LEAST_REST:
            raise ValueError(_WITHIN)
        self._exact[self.size] = rest / rest.norm()
        self._basis[self.size] = self._exact[self.size].to(self._basis)
        self._open[self.size % _BLOCK] = unit
        self.size += 1
        if self.size % _BLOCK == 0:
            self._close()
        return float(cosines.abs().max()) if len(cosines) else 0.0

    def extend(self, vectors: Float[Tensor, "n d_model"]) -> None:
        """Extend the span by many vectors: the result is that of `add` for each, to the bit.

        Raises:
            ValueError: as `add`.
        """
        first = 0
        while first < len(vectors):
            place = self.size % _BLOCK
            rows = vectors[first : first + _BLOCK - place]
            if place + len(rows) < _BLOCK:
                for row in rows:
                    self.add(row)
            else:
                self._open[place:] = self._units(rows)
                self.size += len(rows)
                self._close()
            first += len(rows)

    def _units(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The directions of vectors for which there is room."""
        if self.size + len(vectors) > len(self._exact):
            raise ValueError(f"the subspace is full: it was made for {len(self._exact)} vectors")
        rows = vectors.to(self._exact)
        # Row by row: a norm of many rows at once may differ in its last bits.
        norms = torch.stack([row.norm() for row in rows])
        for norm in norms[~(torch.isfinite(norms) & (norms > 0))]:
            raise ValueError(f"a direction needs a finite norm above 0; got {norm:g}")
        return rows / norms[:, None]

    def _close(self) -> None:
        """Compute the basis of the newest block anew: block Gram-Schmidt, applied twice, and QR within the block."""
        earlier, block = self._exact[: self.size - _BLOCK], self._open
        for _ in range(2):
            # The rows of `q` have the directions that Gram-Schmidt gives, up to their signs: the diagonal's.
            q, r = torch.linalg.qr(_remove(block, earlier, passes=1).T)
            if r.diagonal().abs().min() < _LEAST_REST:
                raise ValueError(_WITHIN)
            block = (q * r.diagonal().sign()).T
        self._exact[self.size - _BLOCK : self.size] = block
        self._basis[self.size - _BLOCK : self.size] = block.to(self._basis)


def _remove(rows: Float[Tensor, "*n d_model"], basis: Float[Tensor, "size d_model"], passes: int = 2) -> Tensor:
    for _ in range(passes):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def beside(base: Float[Tensor, " d_model"], directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "k d_model"]:
    """Orthonormal rows, float32, orthogonal to `base`, that with it span what `base` and `directions` span.

    A direction within a thousandth of the span of those before it adds none. None may be zero.
    """
    span = Subspace(len(base), min(len(base), 1 + len(directions)))
    span.add(base)
    for direction in torch.nn.functional.normalize(directions.double(), dim=-1):
        if span.size < len(base) and span.remove_exact(direction).norm() >= _LEAST_REST:
            span.add(direction)
    return span.basis[1:].clone()


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
    largest = 0.0
    for first in range(0, len(units), _GRAM_ROWS):  # in blocks: the whole Gram matrix of 10,000 vectors takes 800 MB
        rows = units[first : first + _GRAM_ROWS]
        cosines = (rows @ units[first:].T).abs()
        largest = max(largest, float(cosines.fill_diagonal_(0).max()))
    return largest
