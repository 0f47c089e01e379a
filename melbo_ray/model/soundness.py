"""Whether a faster way of computing logits is right on a model: compared with the plain one, and kept."""

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
    """Whether a way of computing logits gives this model's; compared once for rows of up to `length` tokens, and kept.

    Where it does not, a warning says what is done `otherwise`.
    """
    compared = model.kept.get(name)
    if compared is not None and (compared == 0 or compared >= length):
        return compared > 0
    expected = list(plain())
    try:
        if not all(map(functools.partial(_same, model.dtype), ours(), expected)):
            raise RuntimeError("this model's logits would be others")
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # What a model says to arguments that it does not know is its own.
    except Exception as error:
        warnings.warn(f"{otherwise}, which costs time only: {first_line(error)}", stacklevel=4)
        length = 0
    model.kept[name] = length
    return length > 0


@torch.no_grad()
def require_steerable(model: LanguageModel, tokens: Int[Tensor, " seq"]) -> None:
    """Compared once a model, and kept: one stream runs through its layers, and no position sees what follows it.

    Raises:
        UserError: several streams, or something else; or a model that reads both ways (BERT, XLNet).
    """
    if "steerable" in model.kept:
        return
    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.register_forward_hook(functools.partial(_require_stream, model)).remove)
        alone = _logits(model, tokens)
    # What follows must not change what the model says before it.
    followed = _logits(model, torch.cat([tokens, tokens.flip(0)])[: model.max_length])[: len(tokens)]
    gaps = (followed - alone).norm(dim=-1) / alone.norm(dim=-1)
    # Single positions may go another way by the last bits, where experts or keys are chosen.
    if bool(gaps.median() > torch.finfo(model.dtype).eps ** 0.5):
        raise UserError("the model is not causal: what follows a token changes what it says there; take a decoder")
    model.kept["steerable"] = True


def _logits(model: LanguageModel, tokens: Int[Tensor, " seq"]) -> Float[Tensor, "seq vocab"]:
    return model.network(input_ids=tokens[None].to(model.device), use_cache=False).logits[0].float()


def _require_stream(model: LanguageModel, _layer: nn.Module, _args: tuple, output: Any) -> None:
    stream(output, 1, model.d_model)


def _same(dtype: torch.dtype, ours: Float[Tensor, "kept vocab"], theirs: Float[Tensor, "kept vocab"]) -> bool:
    """Whether two tables of logits agree row by row to half of the digits of `dtype`, up to a constant each."""
    gap, size = (part - part.mean(-1, keepdim=True) for part in (ours - theirs, theirs))
    return bool((gap.norm(dim=-1) <= torch.finfo(dtype).eps ** 0.5 * size.norm(dim=-1)).all())
