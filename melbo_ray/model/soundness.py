"""Cached checks of a model: whether it can be steered, and whether faster ways of computing are correct on it."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melbo_ray.errors import UserError, first_line
from melbo_ray.model.architecture import stream
from melbo_ray.model.language_model import LanguageModel


def sound(
    model: LanguageModel,
    name: str,
    length: int,
    otherwise: str,
    ours: Callable[[], Iterable[Tensor]],
    plain: Callable[[], Iterable[Tensor]],
) -> bool:
    """Whether a faster way of computing agrees with the plain one on this model.

    The comparison is cached under `name` for rows of up to `length` tokens. If the ways differ, a warning says what is
    done `otherwise`.
    """
    compared = model.kept.get(name)
    if compared is not None and (compared == 0 or compared >= length):
        return compared > 0
    expected = list(plain())
    try:
        if not all(map(functools.partial(_same, model.epsilon), ours(), expected)):
            raise RuntimeError("this model's logits would be others")
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Models raise errors of any type for arguments that they do not accept.
    except Exception as error:
        warnings.warn(f"{otherwise}, which costs time only: {first_line(error)}", stacklevel=4)
        length = 0
    model.kept[name] = length
    return length > 0


@torch.no_grad()
def require_steerable(model: LanguageModel, tokens: Int[Tensor, " seq"]) -> None:
    """Check, once per model, that a single residual stream runs through its layers and that the model is causal.

    Raises:
        UserError: the layers do not pass a single stream, or positions attend to later ones (BERT, XLNet).
    """
    if "steerable" in model.kept:
        return
    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.register_forward_hook(functools.partial(_require_stream, model)).remove)
        alone = _logits(model, tokens)
    # Appended tokens must not change the logits before them.
    followed = _logits(model, torch.cat([tokens, tokens.flip(0)])[: model.max_length])[: len(tokens)]
    gaps = (followed - alone).norm(dim=-1) / alone.norm(dim=-1)
    # The median, because rounding may flip the choice of experts or keys at single positions.
    if bool(gaps.median() > model.epsilon**0.5):
        raise UserError("the model is not causal: what follows a token changes what it says there; take a decoder")
    model.kept["steerable"] = True


def _logits(model: LanguageModel, tokens: Int[Tensor, " seq"]) -> Float[Tensor, "seq vocab"]:
    return model.network(input_ids=tokens[None].to(model.device), use_cache=False).logits[0].float()


def _require_stream(model: LanguageModel, _layer: nn.Module, _args: tuple, output: Any) -> None:
    stream(output, 1, model.d_model)


def _same(epsilon: float, ours: Float[Tensor, "kept vocab"], theirs: Float[Tensor, "kept vocab"]) -> bool:
    """Whether the logits agree row by row to half of the digits of the products, up to a constant per row."""
    gap, size = (part - part.mean(-1, keepdim=True) for part in (ours - theirs, theirs))
    return bool((gap.norm(dim=-1) <= epsilon**0.5 * size.norm(dim=-1)).all())
