"""Privileged directions: the exponent p of the effect of mixtures of two directions.

da Silva and Heimersheim 2026, "Evidence for feature-specific error correction in LLMs": the effect of a perturbation
x v + y w is modelled as a function of its Lᵖ norm (|x/a|ᵖ + |y/b|ᵖ)^(1/p), a and b the norms with which v and w alone
reach the effect. p = 2 is a linear map, which privileges no directions; above 2 mixtures do less than pure directions,
as features with error correction would have it. Two things besides error correction raise p: displacements at an obtuse
angle, even of a linear map, and effects that grow faster than the norm. The first is cancelled by the mean over both
signs of w; the second is in the null, the p of orthogonal effects that grow as these do.
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

# The effect sought is half of the base's; norms from R/4 to 8 R are tried, in ratios of √2: each part of a mixture at
# 45 degrees has the norm that comes before the mixture's.
_EFFECT, _MOST = 0.5, 8
_GRID = [2 ** (step / 2) for step in range(-4, 7)]
_EXPONENTS = torch.linspace(0.5, 8.0, 751, dtype=torch.float64)
_COMPONENTS = 3
_FIGURES = ("p", "p_orthogonal", "norm_pure", "norm_partner", "norm_mixed")
NO_CONTRAST = "the concept has no contrast prompts"


def run(study: Study, vectors: Vectors) -> Rows:
    """Write `privileged`: the exponent p of each vector mixed with each of its partners.

    `partner`: `random` (a seeded direction orthogonal to the vector), `base`, `contrast` (the mean difference of the
    concept's contrast prompts), `component` (the first principal component of the unsteered stream after the source
    layer on concept and neutral texts, sinks dropped). The effect is ‖z(θ) − z(0)‖, sought at half of the base's.
    `norm_pure` and `norm_partner` are a and b; `norm_mixed` is the norm of the mixtures at 45 and −45 degrees whose
    root mean square effect that is, from which p follows: of a linear map it is 2, whatever the angle of the effects.
    `p_orthogonal` is the p that the two would have if their displacements were orthogonal and neither changed the
    other's, √(e(x v)² + e(y w)²): the null. What does not follow, since a direction does not reach the effect with norm
    8 R, is null, and `left_out` says so.

    Beside a chain's rows stand those of random directions in the vectors' places, with a random partner, as a second
    null; beside the base's those of directions that the model is known to use, with a random partner, as positive
    controls: kinds `contrast` and `component` (the first three principal components, index from 1).
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
    if kind == "chain":
        partners["base"] = study.base
    if kind in ("base", "chain"):
        partners |= study.once(known)
    return {name: normalize(other - (other @ unit) * unit, dim=0) for name, other in partners.items()}


def fits_of(
    study: Study, unit: Float[Tensor, " d_model"], partners: dict[str, Float[Tensor, " d_model"]]
) -> dict[str, Row]:
    """The columns of a unit vector mixed with each partner, by its name; partners are orthogonal to it, of norm 1."""
    directions = [unit]
    for other in partners.values():
        directions += [other, normalize(unit + other, dim=0), normalize(unit - other, dim=0)]
    pure, *rest = _effects(study, torch.stack(directions))
    groups = zip(partners, rest[::3], rest[1::3], rest[2::3], strict=True)
    return {name: _fit(study, pure, alone, _root_mean_square(*signs)) for name, alone, *signs in groups}


def _fit(study: Study, pure: Tensor, alone: Tensor, mixed: Tensor) -> Row:
    """The columns, from the effects of both directions and of their mixtures at the norms of the grid."""
    grid = [math.log(step * study.radius) for step in _GRID]
    # Each part of a mixture has the norm before the mixture's.
    orthogonal = _root_mean_square(pure[:-1], alone[:-1]) * math.sqrt(2)
    a, b, norm = (_crossing(grid, curve) for curve in (pure, alone, mixed))
    if a is None or b is None:
        p = null = None
    else:
        p, null = (exponent(a, b, found) for found in (norm, _crossing(grid[1:], orthogonal)))
    reason = f"no norm up to {_MOST} R has half of the base's effect" if p is None or null is None else None
    return dict(zip(_FIGURES, (p, null, a, b, norm), strict=True)) | {"left_out": reason}


def exponent(a: float, b: float, mixed: float | None) -> float | None:
    """The p whose contour |x/a|ᵖ + |y/b|ᵖ = 1 is nearest, in log r, to a mixture at 45 degrees of norm r = `mixed`."""
    if mixed is None:
        return None
    x, y = 1 / (math.sqrt(2) * a), 1 / (math.sqrt(2) * b)
    predicted = -(x**_EXPONENTS + y**_EXPONENTS).log() / _EXPONENTS
    return float(_EXPONENTS[(predicted - math.log(mixed)).abs().argmin()])


def _root_mean_square(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return ((one.square() + other.square()) / 2).sqrt()


def _effects(study: Study, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n grid"]:
    """The effect of each direction at the norms of the grid, in units of the effect sought."""
    thetas = directions[:, None] * (torch.tensor(_GRID) * study.radius)[:, None]
    return moved(study, thetas.flatten(0, 1)).view(len(directions), -1) / study.once(_goal)


def _crossing(grid: list[float], effects: Float[Tensor, " n"]) -> float | None:
    """The smallest norm where the effect reaches 1, log-linear between log norms; below the first by the first step."""
    curve = effects.clamp_min(1e-30).log().tolist()
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
