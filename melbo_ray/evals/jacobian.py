"""The Jacobian J = ∂z/∂θ of the slice at 0, in blocks of rows, each a unit of its own, for `linear`."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from melbo_ray.evals.catalog import BLOCKS
from melbo_ray.evals.context import TRAINING, Chain, Row, Rows, Study
from melbo_ray.model.residual_slice import Slice


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `jacobian`: of each dimension of z in these blocks its gradient at θ = 0, by backward passes.

    `index` is the block, `dimension` that of z, `row` (d_model,) its gradient.
    """
    slice_, z_from = study.once(slice_of), study.config.z_from
    rows = []
    for blocks, outputs in batches(study, items, slice_.rows_at_once):
        theta = torch.zeros(len(outputs), len(study.base), device=study.model.device, requires_grad=True)
        z = slice_.z(theta, z_from=z_from)
        (gradients,) = torch.autograd.grad(z.gather(1, outputs[:, None]).sum(), theta)
        rows += rows_of(study, blocks, outputs, gradients)
    return {"jacobian": rows}


def slice_of(study: Study) -> Slice:
    """The slice on the training prompt."""
    return Slice(study.model, [study.tokens(TRAINING)], study.config.source_layer, study.config.target_layer)


def batches(study: Study, items: Sequence[int], most: int) -> Iterator[tuple[list[int], Int[Tensor, " n"]]]:
    """The block of each dimension, and the dimensions, in these of the `BLOCKS` blocks; at most so many at once.

    Dimensions are those of the residual stream, on the model's device. A block has d_model / BLOCKS of them, or none.
    """
    d_model = len(study.base)
    of = [(item, i) for item in items for i in range(item * d_model // BLOCKS, (item + 1) * d_model // BLOCKS)]
    for start in range(0, len(of), most):
        blocks, dimensions = zip(*of[start : start + most], strict=True)
        yield [*blocks], torch.tensor(dimensions, device=study.model.device)


def rows_of(
    study: Study, blocks: list[int], dimensions: Int[Tensor, " n"], gradients: Float[Tensor, "n d_model"]
) -> list[Row]:
    """Rows of a matrix as rows of a table."""
    triples = zip(blocks, dimensions.tolist(), gradients.tolist(), strict=True)
    return [study.row("block", block, dimension=dimension, row=gradient) for block, dimension, gradient in triples]


def matrix(chain: Chain, table: str) -> Float64[Tensor, "d_model d_model"]:
    """The matrix whose rows a table of the run holds.

    Raises:
        ValueError: some of its rows are not there, since their evaluation failed.
    """
    stored, d_model = chain.stored(table).sort_by("dimension"), len(chain.base)
    if stored["dimension"].to_pylist() != list(range(d_model)):
        raise ValueError(f"{table} has {stored.num_rows} of {d_model} rows: see its failures, and evaluate it again")
    return torch.tensor(stored["row"].combine_chunks().flatten().to_numpy(), dtype=torch.float64).view(d_model, d_model)
