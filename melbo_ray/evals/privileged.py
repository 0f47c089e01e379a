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
from melbo_ray.evals.efficiency import natural
from melbo_ray.evals.linear import ends, z_of
from melbo_ray.evals.presence import contrast
from melbo_ray.seeds import derive_seed

# The effect sought is half of the base's; norms up to 8 R are tried, in equal ratios.
_EFFECT, _LEAST, _MOST, _GRID = 0.5, 0.25, 8.0, 9
_EXPONENTS = torch.linspace(0.5, 8.0, 751, dtype=torch.float64)
_COMPONENTS = 3
_FIGURES = ("p", "norm_pure", "norm_partner", "norm_mixed")
NO_CONTRAST = "the concept has no contrast prompts"


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `privileged`: the exponent p of each vector mixed with each of its partners.

    `partner`: `random` (a seeded direction orthogonal to the vector), `base`, `contrast` (the mean difference of the
    concept's contrast prompts), `component` (the first principal component of the unsteered stream after the source
    layer on concept and neutral texts, sinks dropped). The effect is ‖z(θ) − z(0)‖, sought at half of the base's.
    `norm_pure` and `norm_partner` are a and b, `norm_mixed` the norm of the mixture at 45 degrees, from which p
    follows. Where a direction does not reach the effect with norm 8 R, figures are null and `left_out` says so.

    Beside a chain's rows stand those of random directions in the vectors' places, as the null; beside the base's those
    of directions that the model is known to use, with a random partner: kinds `contrast` and `component` (the first
    three principal components, index from 1).
    """
    rows = []
    for part in [*with_null(study, vectors), *(_references(study) if vectors.kind == "base" else ())]:
        for index, unit in zip(part.index, normalize(part.theta, dim=-1), strict=True):
            if unit.norm() > 0:
                fits = fits_of(study, unit, _partners(study, part.kind, index, unit))
                rows += [study.row(part.kind, index, partner=name, **fit) for name, fit in fits.items()]
    if vectors.kind == "base" and not study.concept.contrast:
        rows.append(study.row("base", 0, partner="contrast", **dict.fromkeys(_FIGURES), left_out=NO_CONTRAST))
    return {"privileged": rows}


def known(study: Study) -> dict[str, Float[Tensor, " d_model"]]:
    """The partners that are the same for every vector, by name."""
    found = {"component": study.once(components)[0]}
    return found | ({"contrast": study.once(contrast)} if study.concept.contrast else {})


def components(study: Study) -> Float[Tensor, "components d_model"]:
    """The leading principal components of the unit activations `efficiency.natural`, orthonormal rows."""
    activations = study.once(natural).double()
    return torch.linalg.svd(activations - activations.mean(0), full_matrices=False).Vh[:_COMPONENTS].float()


def _references(study: Study) -> list[Vectors]:
    found = study.once(components)
    references = [Vectors("component", range(1, 1 + len(found)), found)]
    return references + ([Vectors("contrast", [0], study.once(contrast)[None])] if study.concept.contrast else [])


def _partners(study: Study, kind: str, index: int, unit: Float[Tensor, " d_model"]) -> dict[str, Tensor]:
    """The partners by name, orthogonal to the vector and of norm 1."""
    draw = more_directions(study, [derive_seed(study.config.seed, kind, index, "privileged") % 2**31]).theta[0]
    partners = {"random": draw}
    if kind in ("chain", "random"):
        partners["base"] = study.base
    if kind in ("base", "chain", "random"):
        partners |= study.once(known)
    return {name: normalize(other - (other @ unit) * unit, dim=0) for name, other in partners.items()}


def fits_of(
    study: Study, unit: Float[Tensor, " d_model"], partners: dict[str, Float[Tensor, " d_model"]]
) -> dict[str, Row]:
    """The columns of a unit vector mixed with each partner, by its name."""
    directions = [unit]
    for other in partners.values():
        directions += [normalize(unit + other, dim=0), other]
    pure, *rest = _norms(study, torch.stack(directions))
    fits = {}
    for name, mixed, alone in zip(partners, rest[::2], rest[1::2], strict=True):
        p = None if pure is None or mixed is None or alone is None else exponent({0: pure, 45: mixed, 90: alone})
        left_out = f"no norm up to {_MOST:g} R has half of the base's effect" if p is None else None
        fits[name] = dict(zip(_FIGURES, (p, pure, alone, mixed), strict=True)) | {"left_out": left_out}
    return fits


def exponent(norms: dict[float, float]) -> float:
    """The p whose contour (r cos φ / a)ᵖ + (r sin φ / b)ᵖ = 1 is nearest to the norms r at angles φ, in log r."""
    a, b, errors = norms[0], norms[90], torch.zeros_like(_EXPONENTS)
    for angle, norm in norms.items():
        if angle not in (0, 90):
            x, y = math.cos(math.radians(angle)) / a, math.sin(math.radians(angle)) / b
            predicted = -(x**_EXPONENTS + y**_EXPONENTS).log() / _EXPONENTS
            errors += (predicted - math.log(norm)).square()
    return float(_EXPONENTS[errors.argmin()])


def _norms(study: Study, directions: Float[Tensor, "n d_model"]) -> list[float | None]:
    """The smallest norm of each with the effect sought, by log-linear interpolation on the grid; None if none."""
    grid = torch.logspace(math.log10(_LEAST), math.log10(_MOST), _GRID) * study.radius
    thetas = (directions[:, None] * grid[:, None]).flatten(0, 1)
    effects = moved(study, thetas).view(len(directions), -1) / study.once(_goal)
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
    return (z_of(study, thetas) - study.once(ends)[0]).norm(dim=-1).float()
