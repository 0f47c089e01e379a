"""What a model calls its layers with besides the hidden states, of several prompts at once."""

from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from melbo_ray.errors import UserError

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class ByPrompt:
    """A tensor of which each prompt has its own, such as the embeddings that a layer adds to each token.

    Attributes:
        values: (prompts, …).
    """

    values: Shaped[Tensor, "prompts ..."]


def together(prompts: Sequence[Any], made: dict[int, Any]) -> Any:
    """The arguments of a pass over each prompt as one: tensors in which they differ become `ByPrompt`.

    Args:
        prompts: for each prompt its argument, or what holds several.
        made: what came of objects that several calls share; they share it, too.

    Raises:
        UserError: they differ in something that has no row for each prompt.
    """
    first = prompts[0]
    if isinstance(first, UserDict):
        # Where layers leave keys and values for later ones: of the whole batch, whatever the prompts.
        if id(first) not in made:
            kept = {key: [torch.cat(parts) for parts in zip(*(p[key] for p in prompts), strict=True)] for key in first}
            made[id(first)] = type(first)({key: tuple(map(ByPrompt, parts)) for key, parts in kept.items()})
        return made[id(first)]
    if isinstance(first, dict):
        return {key: together([prompt[key] for prompt in prompts], made) for key in first}
    if isinstance(first, list | tuple):
        return tuple(together(parts, made) for parts in zip(*prompts, strict=True))
    if isinstance(first, Tensor) and not all(torch.equal(first, other) for other in prompts):
        if any(other.shape != first.shape for other in prompts) or first.shape[:1] != (1,):
            raise UserError("the model calls its layers differently for each prompt: give one prompt (or concept)")
        return ByPrompt(torch.cat(list(prompts)))
    if isinstance(first, _PLAIN) and any(other != first for other in prompts):
        raise UserError("the model calls its layers differently for each prompt: give one prompt (or concept)")
    return first


def chosen(arguments: Any, rows: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Any:
    """The arguments of a batch: `rows` of what is `ByPrompt`. `made`: as in `together`, of one pass."""
    if isinstance(arguments, ByPrompt):
        return rows(arguments.values)
    if isinstance(arguments, UserDict):
        if id(arguments) not in made:
            made[id(arguments)] = type(arguments)({k: chosen(v, rows, made) for k, v in arguments.items()})
        return made[id(arguments)]
    if isinstance(arguments, dict):
        return {key: chosen(value, rows, made) for key, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(chosen(value, rows, made) for value in arguments)
    return arguments
