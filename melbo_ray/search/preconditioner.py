"""The diagonal preconditioner of L-BFGS.

Models differ in how evenly the target layer answers to directions of θ: of ∂z/∂θ at 0 the largest singular value is 3
to 4 times the hundredth in SmolLM2 and Qwen2.5, and 13 times in Gemma 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.config import ChainOptions
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.lockstep import value_and_grad
from melbo_ray.seeds import derive_seed

TARGETS = 64
"""Evaluations that a preconditioner takes, once a slice."""
# Part of the mean square that is added to every coordinate's.
_FLOOR = 0.01
# Norm of the θ that stands for 0, where the norm penalty has no gradient; relative to the stream's median norm.
_NEAR_0 = 1e-6


def preconditioner(slice: Slice, rows: Sequence[int], options: ChainOptions) -> dict[int, Float[Tensor, " d_model"]]:
    """The diagonal s on each of these rows of the slice: s_i = (m_i / mean(m) + 0.01)^(-1/4), m_i the mean of (Jᵀu)_i².

    J = ∂z/∂θ at θ = 0, and u is uniform on the unit sphere, so E[m_i] = Σ_j J_ji² / d_model. A gradient step in the
    coordinates θ_i / s_i is one along g_i / √m_i: the diagonal of Adam and AdaGrad, with random targets in place of
    past gradients (Kingma and Ba 2014; Duchi, Hazan and Singer 2011). It takes `TARGETS` evaluations in a batch of
    `rows`, in which a row may occur more than once, and is kept with the slice.

    Args:
        slice: the slice.
        rows: rows of prompts in the slice.
        options: definition of z and of the loss; `max_norm` in residual-stream units.

    Returns:
        By row of the slice, (d_model,) float64 on its device; rows measured before are among them.
    """
    known = slice.preconditioners.setdefault(options.z_from, {})
    if not known.keys() >= {*rows}:
        known.update(_measured(slice, torch.tensor(rows, device=slice.model.device), options))
    return known


def _measured(slice: Slice, rows: Tensor, options: ChainOptions) -> dict[int, Float[Tensor, " d_model"]]:
    d_model, device = slice.model.d_model, slice.model.device
    unit = torch.full((len(rows), d_model), d_model**-0.5, device=device)
    theta = unit * (_NEAR_0 * slice.h_source.norm(dim=-1).median())
    with torch.no_grad():
        z = slice.z(theta, rows, options.z_from)
    generator = torch.Generator().manual_seed(derive_seed(0, "", 0, "preconditioner"))
    squares = torch.zeros(len(rows), d_model, dtype=torch.float64, device=device)
    for _ in range(TARGETS):
        direction = torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0).to(device)
        # Its distance does not matter to the gradient, and is large against the rounding of z.
        target = z - direction * z.norm(dim=-1, keepdim=True)
        _, gradient = value_and_grad(slice, theta, target, rows, options)
        squares += (gradient - options.norm_penalty * unit).double() ** 2
    means = squares.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return dict(zip(rows.tolist(), (squares / means + _FLOOR) ** -0.25, strict=True))
