"""Less than the whole of a model: its shape without weights, or its layers up to the target alone."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melbo_ray.config import Config, UserError, first_line
from melbo_ray.fingerprint import fingerprint
from melbo_ray.model import LanguageModel, load_config, locate, pick_device


def sketch(config: Config) -> LanguageModel:
    """The model without its weights: tokenizer, and modules on the meta device.

    Raises:
        UserError: no such model, or its decoder layers cannot be found.
    """
    shape = load_config(config.model, config.revision, config.trust_remote_code)
    dtype = shape.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            shape, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code
        )
    return LanguageModel.wrap(network, _tokenizer(config), name=config.model, revision=config.revision)


def lower(config: Config) -> LanguageModel:
    """The model's embedding and its decoder layers 0 … target: all that a chain needs, nothing above is read.

    The layers and what flows through them are those of the whole model; its logits are not. A GGUF file, which
    transformers reads as a whole, gives the whole model.

    Raises:
        UserError: as `LanguageModel.load`.
    """
    path, options = locate(config.model)
    if "gguf_file" in options:
        return LanguageModel.load(
            config.model, revision=config.revision, dtype=config.dtype, device=config.device,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
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
