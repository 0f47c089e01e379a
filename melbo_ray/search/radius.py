"""The calibration of the radius R: the norm at which the effect of random vectors departs from its linear part.

Source: the calibration of Mack's DCT (2024, "Deep causal transcoding"), which solves for a ratio of 0.5. A ratio of 0.3
gives usable base vectors on the two models tested; 0.5 breaks both, and at 0.25 few vectors show the concept.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice

TARGET = 0.3
_DIRECTIONS = 16
# The norms of the curve, relative to the residual stream's, a factor √2 apart, up to the stream's own.
_RELATIVE = [2 ** (step / 2) for step in range(-16, 1)]
# Step of the difference quotient for the linear part, relative to the stream's norm: far above float32 rounding.
_LINEAR = 1e-3
_ROWS = 8
# A massive activation forms where the norm grows between the layers by this multiple of the median growth. It is 6.8 at
# least at such positions and 1.8 at most elsewhere, on two models at eight pairs of layers and four prompts.
_FORMS = 4.0


@dataclass(frozen=True)
class Calibration:
    """The calibrated radius and its curve.

    Attributes:
        radius: R at which the curve crosses `TARGET`, by interpolation in log R (residual-stream units).
        radii: norms of the curve, increasing (residual-stream units).
        nonlinearity: √ mean(‖Δ(Rv) − R·Jv‖² / ‖R·Jv‖²) over random unit vectors v at each norm; infinite if the model's
            activations are not finite.
    """

    radius: float
    radii: list[float]
    nonlinearity: list[float]


def calibrate(slice: Slice, seed: int) -> Calibration:
    """Calibrate the radius for the slice's prompt and layers, in about a hundred forward passes of the slice.

    Δ(θ) is the change of the target layer's residual stream at the `ordinary` positions; J is its Jacobian at 0.

    Raises:
        UserError: the response is not near-linear at the smallest norm, or still near-linear at the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    units = normalize(torch.randn(_DIRECTIONS, slice.model.d_model, generator=generator)).to(slice.model.device)
    stream, where = float(slice.h_source[0, 1:].norm(dim=-1).median()), ordinary(slice)
    step = _LINEAR * stream
    linear = (_change(slice, step * units, where) - _change(slice, -step * units, where)) / (2 * step)
    radii = [relative * stream for relative in _RELATIVE]
    ratios = [_departure(_change(slice, radius * units, where), radius * linear) for radius in radii]
    return Calibration(_crossing(radii, ratios), radii, ratios)


@torch.no_grad()
def ordinary(slice: Slice) -> Bool[Tensor, " seq"]:
    """The positions but the first, an attention sink in many models, and those where a massive activation forms.

    Massive activations (Sun et al. 2024) form within few layers at some tokens, in Qwen2.5-0.5B after layer 4. The
    response there is non-linear at norm 1 already (4 → 12: ratio 0.7, elsewhere 0.1), so R would be 1.1 instead of 2.9.
    """
    still = slice.h_target(slice.h_source.new_zeros(1, slice.model.d_model))[0]
    growth = (still.float().norm(dim=-1) / slice.h_source[0].float().norm(dim=-1))[1:]
    return torch.cat([growth.new_zeros(1).bool(), growth < _FORMS * growth.median()])


def _change(slice: Slice, theta: Float[Tensor, "n d_model"], where: Bool[Tensor, " seq"]) -> Float[Tensor, "n values"]:
    with torch.no_grad():
        rows = torch.cat([theta.new_zeros(1, theta.shape[1]), theta])
        h = torch.cat([slice.h_target(part).float()[:, where].flatten(1) for part in rows.split(_ROWS)])
    return h[1:] - h[0]


def _departure(change: Tensor, linear: Tensor) -> float:
    ratio = float(((change - linear).square().sum(1) / linear.square().sum(1)).mean().sqrt())
    return ratio if math.isfinite(ratio) else math.inf


def _crossing(radii: list[float], ratios: list[float]) -> float:
    """The norm at which the curve first crosses `TARGET`, interpolated in the logarithm of the norm."""
    above = next((i for i, ratio in enumerate(ratios) if ratio >= TARGET), None)
    if not above:
        side = "below" if above is None else "above"
        raise UserError(
            f"no usable radius: the non-linear share of the response is {side} {TARGET:g} from norm {radii[0]:.3g} "
            f"to {radii[-1]:.3g}: give `radius`"
        )
    share = (TARGET - ratios[above - 1]) / (ratios[above] - ratios[above - 1])
    return radii[above - 1] * (radii[above] / radii[above - 1]) ** share
