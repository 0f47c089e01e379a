"""The share of an attention sink's massive activation in the displacement that a chain matches."""

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.model.residual_slice import Slice


@torch.no_grad()
def target_shares(slice: Slice, base: Float[Tensor, " d_model"], row: int = 0) -> dict[str, float]:
    """The composition of the target displacement z(θ₀) − z(0), with z over all positions.

    `sink_share` is ‖first position's part‖² over the sum of that and ‖the other positions' part‖²; `coordinate_share`
    is the largest coordinate's share of the squared norm. If either is large, a solver can lower the post's loss
    without copying the base's effect on the text.
    """
    device = slice.model.device
    thetas, rows = torch.stack([torch.zeros_like(base), base]).to(device), torch.full((2,), row, device=device)
    unsteered, steered = slice.h_target(thetas, rows).double()
    change = (steered - unsteered)[: int(slice.lengths[row])]
    first, rest, whole = (float(part.square().sum()) for part in (change[0], change[1:].sum(0), change.sum(0)))
    return {"sink_share": first / (first + rest), "coordinate_share": float(change.sum(0).square().max()) / whole}
