"""Partial models: the modules without weights, or the layers up to the target only."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from melbo_ray.config import ModelOptions
from melbo_ray.errors import UserError, first_line
from melbo_ray.model.architecture import begins_with, decoder_layers, truncate
from melbo_ray.model.fingerprint import fingerprint
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import load_config, locate, pick_device


def sketch(config: ModelOptions) -> LanguageModel:
    """The model without weights: its tokenizer, and its modules on the meta device.

    Raises:
        UserError: no such model, or its decoder layers cannot be found.
    """
    return _wrapped(_empty(load_config(config.model, config.revision, config.trust_remote_code), config), config)


def lower(config: ModelOptions) -> LanguageModel:
    """Load the embedding and the decoder layers 0 … target, which is all that a chain needs.

    The layers and their residual stream are those of the whole model; the logits are not. The whole model is loaded
    from a GGUF file, which transformers cannot read in part, and, with a warning, if a shorter model has different
    layers (MiniCPM3 scales them by their number; the last layers of Gemma 4 share keys).

    Raises:
        UserError: as `LanguageModel.load`.
    """
    path, options = locate(config.model)
    shape = _shorter(config)
    if shape is None:
        if "gguf_file" not in options:
            warnings.warn("chains read the whole model, since its layers are others in a shorter one", stacklevel=2)
        return _whole(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            path, config=shape, dtype=dtype, use_safetensors=True, revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {config.model!r}: {first_line(error)}") from error
    return _wrapped(network.to(pick_device(config.device)), config)


def reads_whole(config: ModelOptions) -> bool:
    """Whether `lower` has to load the whole model.

    Raises:
        UserError: no such model.
    """
    return _shorter(config) is None


def _shorter(config: ModelOptions) -> Any:
    """The configuration of the model truncated after the target layer; None if the whole model is needed."""
    if "gguf_file" in locate(config.model)[1]:
        return None
    shape, count = load_config(config.model, config.revision, config.trust_remote_code), config.target_layer + 1
    try:
        whole = _with_layers(_empty(shape, config), config)
        shape = truncate(copy.deepcopy(shape), count, of=len(whole[1]))
        part = _with_layers(_empty(shape, config), config)
    # Families that cannot be truncated raise errors of any type.
    except Exception:
        return None
    short = len(part[1]) == min(count, len(whole[1]))
    return shape if short and begins_with(whole, part) else None


def _whole(config: ModelOptions) -> LanguageModel:
    return LanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device,
        trust_remote_code=config.trust_remote_code, layers=config.layers,
    )  # fmt: skip


def _wrapped(network: PreTrainedModel, config: ModelOptions) -> LanguageModel:
    return LanguageModel.wrap(
        network, _tokenizer(config), name=config.model, revision=config.revision, layers=config.layers
    )


def _with_layers(network: PreTrainedModel, config: ModelOptions) -> tuple[nn.Module, nn.ModuleList]:
    return network, decoder_layers(network, config.layers)


def _empty(shape: Any, config: ModelOptions) -> PreTrainedModel:
    """A network of this configuration on the meta device."""
    dtype = shape.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
        )


def lower_fingerprint(model: LanguageModel, layers: int) -> str:
    """The fingerprint of a model without the decoder layers from number `layers` on.

    It is the same for the whole model and for the part that `lower` loads, so workers with either can be compared.
    """
    (path,) = (name for name, module in model.network.named_modules() if module is model.layers)
    above = tuple(f"{path}.{number}." for number in range(layers, len(model.layers)))
    weights = {name: value for name, value in model.network.state_dict().items() if not name.startswith(above)}
    return fingerprint(truncate(copy.deepcopy(model.network.config), layers, of=len(model.layers)), weights)


def _tokenizer(config: ModelOptions) -> Any:
    path, options = locate(config.model)
    try:
        return AutoTokenizer.from_pretrained(
            path, **options, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {config.model!r}: {first_line(error)}") from error
