"""The Jacobian J = ∂z/∂θ of the slice at 0, in blocks of rows, each a unit of its own, for `linear`."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from melbo_ray.evals.catalog import BLOCKS
from melbo_ray.evals.context import TRAINING, Chain, Row, Rows, Study
from melbo_ray.model.residual_slice import Slice


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `jacobian`: of each dimension of z in these blocks its gradient at θ = 0, by backward passes.

    `index` is the dimension of z, `row` (d_model,) the gradient.
    """
    slice_, z_from = study.once(slice_of), study.config.z_from
    rows = []
    for outputs in batches(study, items, slice_.rows_at_once):
        theta = torch.zeros(len(outputs), len(study.base), device=study.model.device, requires_grad=True)
        z = slice_.z(theta, z_from=z_from)
        (gradients,) = torch.autograd.grad(z.gather(1, outputs[:, None]).sum(), theta)
        rows += rows_of(study, outputs, gradients)
    return {"jacobian": rows}


def slice_of(study: Study) -> Slice:
    """The slice on the training prompt."""
    return Slice(study.model, [study.tokens(TRAINING)], study.config.source_layer, study.config.target_layer)


def batches(study: Study, items: Sequence[int], most: int) -> list[Int[Tensor, " n"]]:
    """The dimensions in these of the `BLOCKS` blocks of the residual stream, at most so many at once; on the device."""
    d_model = len(study.base)
    blocks = [torch.arange(item * d_model // BLOCKS, (item + 1) * d_model // BLOCKS) for item in items]
    return [some.to(study.model.device) for some in torch.cat(blocks).split(most) if len(some)]


def rows_of(study: Study, outputs: Int[Tensor, " n"], gradients: Float[Tensor, "n d_model"]) -> list[Row]:
    """Rows of a matrix as rows of a table."""
    pairs = zip(outputs.tolist(), gradients.tolist(), strict=True)
    return [study.row("row", dimension, row=gradient) for dimension, gradient in pairs]


def matrix(chain: Chain, table: str) -> Float64[Tensor, "d_model d_model"]:
    """The matrix whose rows a table of the run holds.

    Raises:
        ValueError: some of its rows are not there, since their evaluation failed.
    """
    stored, d_model = chain.stored(table), len(chain.base)
    if stored["index"].to_pylist() != list(range(d_model)):
        raise ValueError(f"{table} has {stored.num_rows} of {d_model} rows: see its failures, and evaluate it again")
    return torch.tensor(stored["row"].combine_chunks().flatten().to_numpy(), dtype=torch.float64).view(d_model, d_model)
