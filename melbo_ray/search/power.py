"""The leading right singular vectors of the slice's Jacobian: the directions of largest effect at small norm.

J = ∂ h_target / ∂ θ at θ = 0, with h_target at the positions that MELBO's norm runs over. At small norms MELBO's
objective with p = q = 2 is ‖J θ‖, so these vectors are its maxima there.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.stages import Once, Stages, compute
from melbo_ray.seeds import derive_seed

# Step of the differences, relative to the stream's median norm. Curvature changes J by the square of the step, rounding
# in float32 by about 1e-6 over it.
_STEP = 3e-3
_MOST_ITERATIONS, _TOLERANCE = 40, 1e-3


def require_float32(dtype: str) -> None:
    """Check the option `dtype` of a model whose singular vectors are sought.

    Raises:
        UserError: rounding would hide the differences.
    """
    if dtype not in ("float32", "auto"):
        raise UserError(f"power takes differences over small steps: give `dtype` float32, not {dtype}")


def power(
    slice: Slice, count: int, first: int = 0, seed: int = 0, once: Once = compute
) -> Stages[tuple[Float[Tensor, "count d_model"], Float[Tensor, " count"]]]:
    """The `count` leading right singular vectors of J, orthonormal, and its singular values, by block iteration.

    The block has twice `count` vectors; it ends when the values change by less than a thousandth, or after 40
    iterations. Positions before `first` do not count.

    Raises:
        UserError: more vectors than d_model, no position left, or a model that is not in float32.
    """
    d_model = slice.model.d_model
    if count > d_model:
        raise UserError(f"{count} singular vectors: the model has d_model {d_model}")
    if first >= slice.h_source.shape[1]:
        raise UserError(f"`melbo_from` {first}: the prompt has only {slice.h_source.shape[1]} tokens")
    require_float32(str(slice.model.dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(derive_seed(seed, "", 0, "power"))
    block, before = torch.randn(min(2 * count, d_model), d_model, generator=generator), torch.zeros(count)
    for number in range(1, 1 + _MOST_ITERATIONS):
        found, block, values = once(f"power-{count}-{number:02d}", partial(_iterated, slice, block, first))
        yield f"{count} singular vectors: {number} of at most {_MOST_ITERATIONS} iterations"
        if ((values[:count] - before).abs() <= _TOLERANCE * values[:count]).all():
            break
        before = values[:count]
    return found[:count], values[:count]


def _iterated(slice: Slice, block: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best vectors within the block's span (Rayleigh-Ritz), the next block, and the singular values."""
    block = torch.linalg.qr(block.double().T).Q.T.float()
    image = _squared(slice, block, first)
    gram = (block @ image.T).double()
    values, rotation = torch.linalg.eigh((gram + gram.T) / 2)
    order = values.argsort(descending=True)
    values, rotation = values[order].clamp_min(0).sqrt().float(), rotation[:, order].T.float()
    return rotation @ block, rotation @ image, values


def _squared(slice: Slice, block: Float[Tensor, "n d_model"], first: int) -> Float[Tensor, "n d_model"]:
    """JᵀJ v of each row v, on the CPU, as the central difference of the gradient of ½‖h_target(θ) − h_target(0)‖²."""
    device = slice.model.device
    step = _STEP * float(slice.h_source.norm(dim=-1).median())
    with torch.no_grad():
        unsteered = slice.h_target(torch.zeros(1, block.shape[1], device=device))
    signed, gradients = torch.cat([block, -block]) * step, []
    for rows in signed.split(slice.rows_at_once):
        theta = rows.to(device).requires_grad_()
        change = (slice.h_target(theta) - unsteered)[:, first:]
        gradients += torch.autograd.grad((change * change).sum() / 2, theta)
    ahead, behind = torch.cat(gradients).cpu().chunk(2)
    return (ahead - behind) / (2 * step)
