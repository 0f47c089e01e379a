"""Gain: whether the effect of a vector is linear about another point than 0.

Let s(θ) = (z(θ) − z(0))·a / ‖a‖², a = z(θ₀) − z(0): the part of the base's displacement that θ has. Its derivative
along a vector, J(tθ)θ·a / ‖a‖² at the point tθ, is what is gained there per unit of t; over t from 0 to 1 its integral
is s(θ). It is constant if z is linear, and proportional to t if z is quadratic. J at other points is never formed: the
gradient ∇s = Jᵀa / ‖a‖² takes one backward pass.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.jacobian import slice_of
from melbo_ray.evals.linear import aim, ends

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `gain`: a row per vector and point where the derivative is taken; beside a chain's rows those of the null.

    `point` is `own` for the points tθ, t in `fraction`, and `base` for θ₀. There `along` is s, `gain` Jθ·a / ‖a‖², and
    `sensitivity` ‖Jᵀa‖ / ‖a‖² (per residual-stream unit), which the most effective direction gains per unit;
    `sensitivity_beside` the same of the directions that a chain can take, ‖P Jᵀa‖ / ‖a‖² (P as `Study.beside`).

    The linear map about θ₀ is 1 + g·(θ − θ₀), g = Jᵀa / ‖a‖² there. A loss ℓ takes g·θ ≥ m, m = g·θ₀ − ℓ, so that by
    Bessel's inequality it has at most (sensitivity_beside r / m)² orthogonal vectors of norm r with it, if m > 0. The
    null, of kind `random`: a random direction of each vector's norm (`more_directions`).
    """
    rows = []
    for part in with_null(study, vectors):
        for index, theta in zip(part.index, part.theta, strict=True):
            rows += [study.row(part.kind, index, **columns) for columns in _gains(study, theta)]
    return {"gain": rows}


def _gains(study: Study, theta: Float[Tensor, " d_model"]) -> list[Row]:
    points = {("own", at): theta * at for at in POINTS} | {("base", 1.0): study.base}
    reached, gradients = derivatives(study, torch.stack([*points.values()]))
    gained, sensitivities = gradients @ theta.double(), gradients.norm(dim=-1)
    beside = study.beside(gradients).norm(dim=-1)
    figures = {"along": reached, "gain": gained, "sensitivity": sensitivities, "sensitivity_beside": beside}
    return [
        {"point": point, "fraction": at, "norm": float(theta.norm())}
        | {name: float(x[i]) for name, x in figures.items()}
        for i, (point, at) in enumerate(points)
    ]


def derivatives(
    study: Study, thetas: Float[Tensor, "n d_model"]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "n d_model"]]:
    """s(θ) and ∇s(θ) of each vector, float64 on the CPU."""
    values, gradients = [], []
    for part in thetas.split(study.once(slice_of).rows_at_once):
        theta = part.to(study.model.device, copy=True).requires_grad_()
        value = along(study, theta)
        gradients += torch.autograd.grad(value.sum(), theta)
        values.append(value.detach())
    return torch.cat(values).double().cpu(), torch.cat(gradients).double().cpu()


def along(study: Study, theta: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    """s(θ) of each vector, which can be differentiated; on the model's device."""
    unsteered, towards = study.once(ends)[0], study.once(aim)
    z = study.once(slice_of).z(theta, z_from=study.config.z_from)
    return (z - unsteered.to(z)) @ (towards / towards.square().sum()).to(z)
