"""The differences between model families: location of the layers, their arguments and outputs, masks, truncation.

All other modules of this folder are independent of the family. `docs/architectures.md` lists the supported families.
"""

from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from melbo_ray.errors import UserError

KNOWN_MASKS = {"full_attention", "sliding_attention"}
"""Layer types that `masks` supports."""
_PLAIN = (bool, int, float, str, type(None))


def decoder_layers(network: PreTrainedModel, path: str | None = None) -> nn.ModuleList:
    """The module list at the dotted `path`; by default the only one whose length is the configured number of layers.

    Raises:
        UserError: no module list at `path`; or, without `path`, not exactly one of that length.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    # Lists within a layer, such as experts, are not suggested.
    outer = {name: f"{name} ({len(m)})" for name, m in lists.items() if not any(map(str.isdigit, name.split(".")))}
    known = f"expected the dotted path of one of its module lists, {', '.join(outer.values()) or 'and it has none'}"
    family = type(network).__name__
    if path is not None:
        if path not in lists:
            raise UserError(f"`layers` is {path!r}, which is no module list of {family}: {known}")
        return lists[path]
    count = network.config.get_text_config().num_hidden_layers
    found = [module for module in lists.values() if len(module) == count]
    if len(found) != 1:
        raise UserError(
            f"cannot tell the decoder layers of {family}: {len(found)} module lists have {count} entries, expected 1; "
            f"give `layers`: {known}"
        )
    return found[0]


def max_length(network: PreTrainedModel) -> int:
    """Maximum number of tokens that the model accepts."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    # XLNet has -1 for no limit.
    return limit if limit and limit > 0 else 1 << 30


def key_width(network: PreTrainedModel) -> int:
    """Number of key values per token and layer: key-value heads × head dimension."""
    text = network.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def stream(output: Any, batch: int | None = None, d_model: int | None = None) -> Float[Tensor, "batch seq d_model"]:
    """The hidden states in a layer's output, bare or first in a tuple.

    Raises:
        UserError: the output is not a single residual stream, or has another batch size or width.
    """
    h = output[0] if type(output) is tuple else output
    one = isinstance(h, Tensor) and h.ndim == 3
    if not one or batch not in (None, len(h)) or d_model not in (None, h.shape[-1]):
        found = "×".join(map(str, h.shape)) if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise UserError(
            f"cannot steer this model: between its layers runs {found}, not one stream (batch, seq, d_model)"
        )
    return h


def with_stream(output: Any, h: Tensor) -> Any:
    """A layer's output with its hidden states replaced by `h`."""
    return (h, *output[1:]) if isinstance(output, tuple) else h


def taken(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple, dict[str, Any]]]:
    """The hidden states among a layer's arguments, and its other positional and keyword arguments."""
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return stream(args[0] if args else kwargs["hidden_states"]), (args[1:], others)


def layer_types(network: PreTrainedModel) -> list[str]:
    """The layer types of a model with several kinds of attention."""
    config = network.config.get_text_config()
    chunked = ["chunked_attention"] if getattr(config, "attention_chunk_size", None) else []
    return sorted({*(getattr(config, "layer_types", None) or []), *chunked})


def masks(
    network: PreTrainedModel,
    seen: Bool[Tensor, "rows query key"],
    here: Int[Tensor, "rows query"],
    there: Int[Tensor, "#rows key"],
) -> Float[Tensor, "rows 1 query key"] | dict[str, Tensor]:
    """The attention mask in the form that the model takes: one mask, or one per layer type.

    Args:
        network: the model.
        seen: the keys that each query may attend to, apart from a sliding window.
        here: positions of the queries in their texts.
        there: positions of the keys in their texts.

    Raises:
        RuntimeError: a layer type that is not in `KNOWN_MASKS`.
    """
    types = layer_types(network)
    if unknown := set(types) - KNOWN_MASKS:
        raise RuntimeError(f"the masks of {min(unknown)} are not known here")

    def mask(seen: Tensor) -> Tensor:
        blank = torch.zeros(seen.shape, dtype=network.dtype, device=seen.device)
        return blank.masked_fill(~seen, torch.finfo(network.dtype).min)[:, None]

    everything = near = mask(seen)
    if window := getattr(network.config.get_text_config(), "sliding_window", None):
        near = mask(seen & (there[:, None] > here[..., None] - window))
    # The same choice as in transformers' `create_masks_for_generate`.
    return {name: near if name == "sliding_attention" else everything for name in types} if types else near


@dataclass(frozen=True)
class ByPrompt:
    """A tensor argument that differs between prompts, such as per-layer token embeddings.

    Attributes:
        values: one row per prompt, (prompts, …).
    """

    values: Shaped[Tensor, "prompts ..."]


def together(prompts: Sequence[Any], made: dict[int, Any]) -> Any:
    """Merge a layer's arguments for several prompts; tensors that differ between prompts become `ByPrompt`.

    Args:
        prompts: the argument, or a container of arguments, for each prompt.
        made: merged objects by identity, so that objects shared between calls stay shared.

    Raises:
        UserError: the arguments differ in something other than a tensor with one row per prompt.
    """
    first = prompts[0]
    if isinstance(first, UserDict):
        # Layers pass keys and values to later layers in this dictionary; its tensors always have a row per prompt.
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
    """The arguments for a batch: `rows` selects from every `ByPrompt`. `made` is as in `together`, for one pass."""
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


def truncate(shape: Any, layers: int, of: int) -> Any:
    """Truncate a transformers configuration, in place, to the first `layers` `of` its decoder layers.

    Lists with one entry per layer are truncated too. LongCat counts every layer twice in `num_hidden_layers`.
    """
    text = shape.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(max(1, before // of) * layers, before)
    return shape


def begins_with(whole: tuple[nn.Module, nn.ModuleList], part: tuple[nn.Module, nn.ModuleList]) -> bool:
    """Whether `part` consists of the first layers of `whole`, judged by weights and attributes of the modules.

    Both are given as network and decoder layers.
    """
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network, _ in (whole, part)]
    # A layer's own keys or a scale may exist in one of the two networks only.
    layers = (map(_facts, layers) for _, layers in (whole, part))
    return shapes[1].items() <= shapes[0].items() and all(a == b for a, b in zip(*layers, strict=False))


def _facts(layer: nn.Module) -> dict[str, Any]:
    """Names and shapes of a layer's weights, and the plain attributes of its modules."""
    plain = {
        f"{name}.{key}": value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
    }
    return plain | {name: value.shape for name, value in layer.state_dict().items()}
