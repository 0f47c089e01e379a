"""Less than the whole of a model: its shape without weights, or its layers up to the target alone."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from melbo_ray.config import Config
from melbo_ray.errors import UserError, first_line
from melbo_ray.model.architecture import decoder_layers
from melbo_ray.model.fingerprint import fingerprint
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import load_config, locate, pick_device


def sketch(config: Config) -> LanguageModel:
    """The model without its weights: tokenizer, and modules on the meta device.

    Raises:
        UserError: no such model, or its decoder layers cannot be found.
    """
    network = _empty(load_config(config.model, config.revision, config.trust_remote_code), config)
    return LanguageModel.wrap(network, _tokenizer(config), name=config.model, revision=config.revision)


def lower(config: Config) -> LanguageModel:
    """The model's embedding and its decoder layers 0 … target: all that a chain needs, nothing above is read.

    The layers and what flows through them are those of the whole model; its logits are not. The whole model serves
    where less cannot: of a GGUF file, which transformers reads as a whole, and of a model whose layers are others in a
    shorter one (MiniCPM3 scales them by their number, the last of Gemma 4 share keys); of that a warning tells.

    Raises:
        UserError: as `LanguageModel.load`.
    """
    path, options = locate(config.model)
    if reads_whole(config):
        if "gguf_file" not in options:
            warnings.warn("chains read the whole model, since its layers are others in a shorter one", stacklevel=2)
        return _whole(config)
    shape = truncate(load_config(config.model, config.revision, config.trust_remote_code), config.target_layer + 1)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            path, config=shape, dtype=dtype, use_safetensors=True, revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {config.model!r}: {first_line(error)}") from error
    network = network.to(pick_device(config.device))
    return LanguageModel.wrap(network, _tokenizer(config), name=config.model, revision=config.revision)


def reads_whole(config: Config) -> bool:
    """Whether a chain's model is the whole one, where less cannot serve (`lower`).

    Raises:
        UserError: no such model.
    """
    if "gguf_file" in locate(config.model)[1]:
        return True
    whole = load_config(config.model, config.revision, config.trust_remote_code)
    return not _separable(whole, truncate(copy.deepcopy(whole), config.target_layer + 1), config)


def _whole(config: Config) -> LanguageModel:
    return LanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def _empty(shape: Any, config: Config) -> PreTrainedModel:
    """A network of this shape on the meta device."""
    dtype = shape.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
        )


def _separable(whole: Any, part: Any, config: Config) -> bool:
    """Whether a model cut to its first layers has there what the whole one has, as far as its modules show."""
    try:
        networks = _empty(whole, config), _empty(part, config)
        lists = [decoder_layers(each) for each in networks]
    # A family that cannot be so short says so in its own way.
    except Exception:
        return False
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in networks]
    # A layer may have weights or choices in one of them alone, such as keys of its own or a scale.
    layers = (map(_facts, each) for each in lists)
    return shapes[1].items() <= shapes[0].items() and all(a == b for a, b in zip(*layers, strict=False))


def _facts(layer: nn.Module) -> dict[str, Any]:
    """Names and shapes of a layer's weights, and the plain values that its modules keep."""
    plain = {
        f"{name}.{key}": value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
    }
    return plain | {name: value.shape for name, value in layer.state_dict().items()}


def lower_fingerprint(model: LanguageModel, layers: int) -> str:
    """The fingerprint of a model's first `layers` decoder layers and of all that is no layer.

    The same of the whole model and of what `lower` has of it, so that workers with either can be compared.
    """
    (place,) = (name for name, module in model.network.named_modules() if module is model.layers)
    above = tuple(f"{place}.{number}." for number in range(layers, len(model.layers)))
    weights = {name: value for name, value in model.network.state_dict().items() if not name.startswith(above)}
    return fingerprint(truncate(copy.deepcopy(model.network.config), layers), weights)


def truncate(shape: Any, layers: int) -> Any:
    """A transformers configuration with the first `layers` decoder layers; lists of one entry a layer are cut too."""
    text = shape.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(layers, before)
    return shape


def _tokenizer(config: Config) -> Any:
    path, options = locate(config.model)
    try:
        return AutoTokenizer.from_pretrained(
            path, **options, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {config.model!r}: {first_line(error)}") from error
