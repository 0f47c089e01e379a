"""The vectors that `base` or `orthogonal_to` names: of a file or another run, or computed without a search."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import BaseOptions, Config
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.contrast import contrast, pairs, prompts_of, read_pairs
from melbo_ray.search.power import power, require_float32
from melbo_ray.search.stages import Once, Stages, compute
from melbo_ray.search.subspace import beside
from melbo_ray.search.vector_io import PAIRS, leading, named_vectors

# Multiples of R at which vectors that were not sought by ascent are judged: at R itself few of them show the concept,
# and on the post's prompt to Qwen2.5-Coder-0.5B the contrast of `alien` shows it firmly from 5.7 R on.
_DOSES = tuple(2 ** (half / 2) for half in range(7))
Look = tuple[str, int | None, Tensor]
"""What is done, the number of ascent steps if there are any, and the candidates."""


def given(
    slice: Slice, concept: Concept, options: BaseOptions, option: str = "base", once: Once = compute
) -> Stages[Float[Tensor, "n d_model"]]:
    """The vectors that the option means: those of a file or a run at their norms, computed ones at any.

    Raises:
        UserError: as `contrast`, `pairs`, `power` and `named_vectors`; or a vector is zero or not finite.
    """
    name, model = str(getattr(options, option)), slice.model
    if name == "contrast":
        found = contrast(model, concept, slice.source, options.system_prompt)
    elif (count := singular(options, option)) is not None:
        found, _ = yield from power(slice, count, options.melbo_from, options.seed, once)
    elif Path(name).suffix == PAIRS:
        found = pairs(model, name, slice.source, options.system_prompt)
    else:
        found = named_vectors(name, model.d_model, slice.source, option, concept.name)
    return _usable(found, option, name)


def avoided(
    slice: Slice, concept: Concept, options: BaseOptions, base: Float[Tensor, " d_model"], once: Once = compute
) -> Stages[Float[Tensor, "k d_model"]]:
    """Orthonormal rows, orthogonal to the base, that with it span the base and the directions of `orthogonal_to`.

    Raises:
        UserError: as `given`.
    """
    if options.orthogonal_to is None:
        return base.new_empty(0, len(base))
    return beside(base, (yield from given(slice, concept, options, "orthogonal_to", once)))


def singular(options: BaseOptions, option: str) -> int | None:
    """Number of the slice's leading singular vectors that the option means; None if it means something else."""
    name = getattr(options, option)
    if option == "base" and name == "power":
        return -(-options.candidates // 2)
    return None if name is None else leading(name)


def seeks(options: BaseOptions) -> bool:
    """Whether vectors are sought by passes through the slice: MELBO's, or singular ones."""
    return options.base == "melbo" or any(singular(options, name) is not None for name in ("base", "orthogonal_to"))


def check_given(config: Config, concept: Concept, d_model: int, option: str) -> int:
    """Check what the option means as far as is possible without the model; returns how many directions are avoided.

    Raises:
        UserError: as `given`, or a model that is not in float32 for `power`.
    """
    name = str(getattr(config, option))
    if name == "contrast":
        prompts_of(concept)
    elif (count := singular(config, option)) is not None:
        require_float32(config.dtype)
        return count
    elif Path(name).suffix == PAIRS:
        read_pairs(name)
    else:
        named = named_vectors(name, d_model, config.source_layer, option, concept.name)
        first, others = _usable(named, option, name)[0], named[1:]
        return 1 if option == "base" else 1 + len(beside(first, others))
    # A mean difference has two rows.
    return 1 if option == "base" else 2


def norms(radius: float, calibrated: bool) -> list[float]:
    """The norms at which vectors that were not sought by MELBO's ascent are judged."""
    return [dose * radius for dose in (_DOSES if calibrated else (1.0,))]


def at_norms(fixed: Float[Tensor, "n d_model"], radius: float | Literal["auto"], calibrated: bool) -> Iterator[Look]:
    """Vectors that were not sought by ascent: at rising multiples of a calibrated R, at a given R, or as they are."""
    if radius == "auto":
        yield "candidates at their own norms", None, fixed
        return
    units = fixed / fixed.norm(dim=-1, keepdim=True)
    for norm in norms(radius, calibrated):
        yield f"candidates of norm {norm:.3g}", None, units * norm


def _usable(vectors: Float[Tensor, "n d_model"], option: str, name: str) -> Float[Tensor, "n d_model"]:
    norms = vectors.double().norm(dim=-1)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise UserError(f"`{option}` {name!r} has a vector of norm 0 or not finite: leave it out")
    return vectors
