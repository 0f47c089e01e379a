"""Reading steering vectors from files, without executing code from them."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError


def read_vectors(path: str, d_model: int, option: str = "base") -> Float[Tensor, "n d_model"]:
    """Read the single tensor, (d_model,) or (n, d_model), of a `.safetensors`, `.npy` or `.pt` file, as float32.

    Code in the file is never executed. `option` is the option that names the file, for errors.

    Raises:
        UserError: no such file, another format, or another shape.
    """
    try:
        match Path(path).suffix:
            case ".safetensors":
                from safetensors.torch import load_file

                found = list(load_file(path).values())
            case ".npy":
                import numpy as np

                found = [torch.from_numpy(np.load(path, allow_pickle=False))]
            case ".pt":
                found = [torch.load(path, weights_only=True, map_location="cpu")]
            case _:
                other = "melbo, contrast, or " if option == "base" else ""
                raise UserError(f"`{option}` is {path!r}: expected {other}a .safetensors, .npy or .pt file")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read vectors from {path!r}: {type(error).__name__}; expected one plain tensor"
        ) from None
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim not in {1, 2}:
        raise UserError(f"{path!r} holds no single tensor of shape (d_model,) or (n, d_model)")
    vectors = found[0].float().reshape(-1, found[0].shape[-1])
    if vectors.shape[-1] != d_model:
        raise UserError(f"the vectors in {path!r} have {vectors.shape[-1]} entries, the model's d_model is {d_model}")
    return vectors
