"""The quadratic null chain: how far the second derivative at 0 would get, vector by vector, without optimising.

To second order the part of the base's displacement that θ has (`gain`) is s(θ) ≈ g·θ + ½ θᵀHθ, with g = ∇s and
H = ∇²s at 0. A linear form has one direction that matters; a quadratic form has as many as H has large positive
eigenvalues, all of them orthogonal. The quadratic chain takes the eigenvectors one after the other, the largest first,
each at the norm of the n-th vector found. Where as many of them have half of the effect as vectors found, curvature
explains the count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from melbo_ray.evals.context import Chain, Row, Rows, Study, Vectors
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.gain import derivatives
from melbo_ray.evals.jacobian import matrix
from melbo_ray.evals.kl import next_token
from melbo_ray.evals.linear import real_losses


class Form(NamedTuple):
    """The quadratic form that s is at 0: H, g, and H's eigenvalues and eigenvectors among what a chain can take.

    Attributes:
        hessian: H, symmetric.
        gradient: g.
        values: eigenvalues of H among what is orthogonal to the base and what the chain avoids, the largest first.
        vectors: their eigenvectors, as rows.
    """

    hessian: Float64[Tensor, "d_model d_model"]
    gradient: Float64[Tensor, " d_model"]
    values: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "k d_model"]


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `curvature`: what the quadratic form has of each vector, beside the model; H's spectrum to `summary`.

    Kinds: `chain`; `quadratic`, the eigenvectors of H that a chain can take, the n-th at the norm of the n-th vector
    found, with the sign of the greater effect, as long as eigenvalues are positive; the null `random`, random
    directions of the chain's norms (`more_directions`). `first_order` is g·θ, `second_order` ½ θᵀHθ, `along` what
    the model has, s(θ); `positive` the share of ‖θ‖² in the space of H's positive eigenvalues; `relative_loss` and
    `kl_from_base` are those of the vector in the model. Rows are those of at most 64 vectors, spread evenly.
    """
    chain, form = whole.vectors, whole.once("form", lambda: form_of(study, matrix(whole, "hessian")))
    if share == "spectrum":
        figures = spectrum(study, form, chain)
        return {"summary": [study.row("chain", 0, figure=f"hessian_{k}", value=v) for k, v in figures.items()]}
    found = chain.at(items)
    parts = [*with_null(study, found), quadratic_chain(form, chain).at(items)]
    return {"curvature": [row for part in parts if len(part) for row in _rows(study, form, part)]}


def form_of(study: Study, rows: Float64[Tensor, "d_model d_model"]) -> Form:
    """The form with these rows of its Hessian, made symmetric."""
    hessian = (rows + rows.T) / 2
    (gradient,) = derivatives(study, torch.zeros_like(study.base)[None])[1]
    free = torch.linalg.qr(study.taken.T, mode="complete").Q[:, len(study.taken) :]
    values, vectors = torch.linalg.eigh(free.T @ hessian @ free)
    return Form(hessian, gradient, values.flip(0), (free @ vectors).T.flip(0))


def quadratic_chain(form: Form, chain: Vectors) -> Vectors:
    """The n-th eigenvector at the n-th norm, with the sign that g gives it; as long as eigenvalues are positive."""
    count = min(len(chain), int((form.values > 0).sum()))
    signs = torch.where(form.vectors[:count] @ form.gradient < 0, -1.0, 1.0)
    theta = form.vectors[:count] * (signs * torch.tensor(chain.norms[:count]))[:, None]
    return Vectors("quadratic", chain.index[:count], theta.float())


def spectrum(study: Study, form: Form, chain: Vectors) -> dict[str, float]:
    """H's extreme eigenvalues beside the base, and how many suffice.

    `positive` are the positive ones, `enough` those with ½ λ r² ≥ ½ at the chain's median norm r; `most_below_half` is
    `most` for a loss of a half at the chain's largest norm.
    """
    values, norms = form.values, torch.tensor(chain.norms)
    return {
        "largest": float(values[0]),
        "smallest": float(values[-1]),
        "positive": float((values > 0).sum()),
        "enough": float((values * norms.median() ** 2 >= 1).sum()),
        "most_below_half": float(most(study.beside(form.gradient), values, float(norms.max()), 0.5)),
    }


def most(gradient: Float64[Tensor, " d_model"], values: Float64[Tensor, " k"], norm: float, loss: float) -> int:
    """An upper bound of the number of orthogonal vectors of at most this norm and loss that a quadratic form has.

    `gradient` and `values` are those of the directions that the vectors can take, `values` sorted, the largest first.
    Each vector needs g·θ + ½ θᵀHθ ≥ 1 − ℓ. Of k of them the sum of g·θ is at most √k ‖g‖ r (Bessel, Cauchy and
    Schwarz), that of ½ θᵀHθ at most ½ r² times the sum of the k largest eigenvalues, negative ones as 0 (Ky Fan 1949,
    "On a theorem of Weyl concerning eigenvalues of linear transformations").
    """
    k = torch.arange(1, 1 + len(values), dtype=torch.float64)
    reached = k.sqrt() * gradient.norm() * norm + values.clamp_min(0).cumsum(0) * norm**2 / 2
    return int((reached >= (1 - loss) * k).sum())


def _rows(study: Study, form: Form, vectors: Vectors) -> list[Row]:
    theta = vectors.theta.double()
    positive = (theta @ form.vectors[form.values > 0].T).square().sum(-1) / theta.square().sum(-1).clamp_min(1e-30)
    columns = {
        "norm": vectors.norms,
        "along": derivatives(study, vectors.theta)[0].tolist(),
        "first_order": (theta @ form.gradient).tolist(),
        "second_order": ((theta @ form.hessian) * theta).sum(-1).div(2).tolist(),
        "positive": positive.tolist(),
        "relative_loss": real_losses(study, vectors.theta),
        "kl_from_base": [row["kl_from_base"] for row in next_token(study, vectors.theta)],
    }
    rows = zip(vectors.index, *columns.values(), strict=True)
    return [study.row(vectors.kind, index, **dict(zip(columns, row, strict=True))) for index, *row in rows]
