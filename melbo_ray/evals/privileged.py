"""Privileged directions: the exponent p of the effect of mixtures of two directions.

da Silva and Heimersheim 2026, "Evidence for feature-specific error correction in LLMs": the effect of a perturbation
x v + y w is modelled as a function of its Lᵖ norm (|x/a|ᵖ + |y/b|ᵖ)^(1/p), a and b the norms with which v and w alone
reach the effect. p = 2 is a quadratic form, which privileges no directions; above 2 mixtures do less than pure
directions, as features with error correction would have it; p = 1 is that of two directions that do the same.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.evals.control import more_directions
from melbo_ray.evals.convergence import with_null
from melbo_ray.evals.linear import z_of
from melbo_ray.search.contrast import contrast as mean_difference
from melbo_ray.seeds import derive_seed

_ANGLES = (0, 45, 90)
# The effect sought is half of the base's; norms up to 8 R are tried, in equal ratios.
_EFFECT, _LEAST, _MOST, _GRID = 0.5, 0.25, 8.0, 9
_EXPONENTS = torch.linspace(0.5, 8.0, 751, dtype=torch.float64)


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `privileged`: the exponent p of each vector mixed with a partner.

    `partner`: `base`, `random` (a seeded direction orthogonal to the vector), and for the base itself `contrast`, where
    the concept has contrast prompts. The effect is ‖z(θ) − z(0)‖, sought at half of the base's. `norm_pure` and
    `norm_partner` are a and b, `norm_mixed` the norm of the mixture at 45 degrees, from which p follows. Where a
    direction does not reach the effect with norm 8 R, figures are null and `left_out` says so. Beside
    a chain's rows stand those of random directions in the vectors' places, as the null.
    """
    rows = []
    for part in with_null(study, vectors):
        for index, theta in zip(part.index, part.theta, strict=True):
            if theta.norm() > 0:
                pairs = _partners(study, part.kind, index, normalize(theta, dim=0))
                rows += [
                    study.row(part.kind, index, partner=name, **_fit(study, normalize(theta, dim=0), other))
                    for name, other in pairs.items()
                ]
    return {"privileged": rows}


def _partners(study: Study, kind: str, index: int, unit: Float[Tensor, " d_model"]) -> dict[str, Tensor]:
    """The partners by name, orthogonal to the vector and of norm 1."""
    draw = more_directions(study, [derive_seed(study.config.seed, kind, index, "privileged") % 2**31]).theta[0]
    partners = {"random": draw}
    if kind != "base":
        partners["base"] = study.base
    elif study.concept.contrast:
        config = study.config
        direction = mean_difference(study.model, study.concept, config.source_layer, config.system_prompt)
        partners["contrast"] = direction
    return {name: normalize(other - (other @ unit) * unit, dim=0) for name, other in partners.items()}


def _fit(study: Study, unit: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"]) -> Row:
    norms = dict(zip(_ANGLES, _norms(study, unit, other), strict=True))
    row: Row = {"norm_pure": norms[0], "norm_partner": norms[90], "norm_mixed": norms[45], "p": None, "left_out": None}
    if any(norm is None for norm in norms.values()):
        return row | {"left_out": f"no norm up to {_MOST:g} R has half of the base's effect"}
    return row | {"p": exponent({angle: float(norm or 0) for angle, norm in norms.items()})}


def exponent(norms: dict[float, float]) -> float:
    """The p whose contour (r cos φ / a)ᵖ + (r sin φ / b)ᵖ = 1 is nearest to the norms r at angles φ, in log r."""
    a, b, errors = norms[0], norms[90], torch.zeros_like(_EXPONENTS)
    for angle, norm in norms.items():
        if angle not in (0, 90):
            x, y = math.cos(math.radians(angle)) / a, math.sin(math.radians(angle)) / b
            predicted = -(x**_EXPONENTS + y**_EXPONENTS).log() / _EXPONENTS
            errors += (predicted - math.log(norm)).square()
    return float(_EXPONENTS[errors.argmin()])


def _norms(study: Study, unit: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"]) -> list[float | None]:
    """The smallest norm at each angle with the effect sought, by log-linear interpolation on the grid; None if none."""
    grid = torch.logspace(math.log10(_LEAST), math.log10(_MOST), _GRID) * study.radius
    angles = torch.tensor(_ANGLES).deg2rad()
    mixtures = angles.cos()[:, None] * unit + angles.sin()[:, None] * other
    thetas = (mixtures[:, None] * grid[:, None]).flatten(0, 1)
    effects = moved(study, thetas).view(len(angles), -1) / study.once(_goal)
    return [_crossing(grid.log().tolist(), curve) for curve in effects.log().tolist()]


def _crossing(grid: list[float], curve: list[float]) -> float | None:
    """The norm where the curve first reaches 0, from log norms; below the grid's start by its first step."""
    for place in range(1, len(curve)):
        if curve[place] >= 0:
            step = (grid[place] - grid[place - 1]) / (curve[place] - curve[place - 1])
            return math.exp(grid[place - 1] - curve[place - 1] * step)
    return None


def _goal(study: Study) -> float:
    return _EFFECT * float(moved(study, study.base[None])[0])


def moved(study: Study, thetas: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    """‖z(θ) − z(0)‖ of each vector, residual-stream units."""
    unsteered, *steered = z_of(study, torch.cat([torch.zeros_like(thetas[:1]), thetas]))
    return (torch.stack(steered) - unsteered).norm(dim=-1).float()
