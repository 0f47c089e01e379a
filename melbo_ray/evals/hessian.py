"""The Hessian H = ∇²s at 0 of the effect s(θ) (`gain`), in blocks of rows, each a unit of its own, for `curvature`."""

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from melbo_ray.evals.context import Chain, Rows, Study
from melbo_ray.evals.gain import along
from melbo_ray.evals.jacobian import batches, rows_of, slice_of

# A second derivative holds about this many times the memory of a gradient.
_MEMORY = 4


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `hessian`: rows of H in these blocks, as Hessian-vector products (Pearlmutter 1994) by double backward.

    `index` is the block, `dimension` the row's, `row` (d_model,) what rounding leaves of a symmetric matrix.
    """
    rows = []
    at_once = max(1, study.once(slice_of).rows_at_once // _MEMORY)
    with sdpa_kernel(SDPBackend.MATH):  # the only implementation that has a second derivative
        for blocks, outputs in batches(study, items, at_once):
            theta = torch.zeros(len(outputs), len(study.base), device=study.model.device, requires_grad=True)
            (gradient,) = torch.autograd.grad(along(study, theta).sum(), theta, create_graph=True)
            (second,) = torch.autograd.grad(gradient.gather(1, outputs[:, None]).sum(), theta)
            rows += rows_of(study, blocks, outputs, second)
    return {"hessian": rows}
