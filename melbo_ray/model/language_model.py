"""Language models: loading, tokenising prompts, decoder layers, fingerprints."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from melbo_ray.errors import UserError, first_line
from melbo_ray.model.architecture import decoder_layers, max_length
from melbo_ray.model.chat import chat
from melbo_ray.model.fingerprint import fingerprint
from melbo_ray.model.loading import EMBEDDED, locate, pick_device

BALANCED = "balanced"
_EPSILON = {"tf32": 2.0**-10, "bfloat16": torch.finfo(torch.bfloat16).eps}


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model of transformers with its tokenizer.

    Attributes:
        network: the transformers model, in eval mode, with no parameter requiring a gradient.
        tokenizer: the model's tokenizer.
        layers: the decoder layers, from index 0.
        name: the name given to `load`.
        revision: the requested hub revision, if any.
        packed: whether to make packed copies of the weights for products on the CPU; None allows up to 4 GiB of them.
        products: how the layers multiply in logits and texts: `float32`, `tf32` or `bfloat16` (`products.multiplying`).
        kept: a cache of objects that depend on the model alone, such as the batch of `generate`.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    name: str = ""
    revision: str | None = None
    packed: bool | None = None
    products: str = "float32"
    kept: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def load(
        cls,
        name: str = EMBEDDED,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        device_map: str | dict[str, str] | None = None,
        trust_remote_code: bool = False,
        layers: str | None = None,
    ) -> "LanguageModel":
        """Load a model from safetensors or GGUF weights, neither of which can execute code.

        Args:
            name: hub id, local directory, GGUF file, or `smollm2` (SmolLM2-135M-Instruct from the package index).
            revision: hub revision: branch, tag or commit.
            dtype: dtype of the weights, or `auto` for that of the file.
            device: `auto`, `cpu` or `cuda`.
            device_map: replaces `device`: accelerate distributes the layers; `balanced` spreads them over all GPUs.
            trust_remote_code: whether a hub model may run its own Python code.
            layers: dotted path of the decoder layers within the network, if they are not found automatically.

        Raises:
            UserError: no such model or layers, CUDA is unavailable, or the GPUs cannot hold the model.
        """
        target = pick_device("cuda" if device_map == BALANCED else device)
        path, options = locate(name)
        options |= {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        weights: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if device_map is not None:
            weights["device_map"] = device_map
        if "gguf_file" not in options:
            weights["use_safetensors"] = True
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
            network = AutoModelForCausalLM.from_pretrained(path, **options, **weights)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
        if device_map is None:
            network = network.to(target)
        elif device_map == BALANCED and {"cpu", "disk"} & {
            str(place) for place in vars(network)["hf_device_map"].values()
        }:
            raise UserError(
                f"the model {name!r} does not fit on {torch.cuda.device_count()} GPUs: give `eval_gpus` more"
            )
        return cls.wrap(network, tokenizer, name=name, revision=revision, layers=layers)

    @classmethod
    def wrap(
        cls,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        revision: str | None = None,
        layers: str | None = None,
    ) -> "LanguageModel":
        """Freeze and wrap a transformers model that is already in memory; arguments as in `load`.

        Raises:
            UserError: the decoder layers cannot be found.
        """
        network.eval().requires_grad_(False)
        name = name or str(network.config.name_or_path)
        return cls(network, tokenizer, decoder_layers(network, layers), name, revision)

    def multiplied(self, products: str) -> "LanguageModel":
        """The same weights and rendered prompts with other products in logits and texts; made once."""
        if products not in self.kept:
            other = self.kept[products] = dataclasses.replace(self, products=products)
            other.kept["rendered"] = self.kept.setdefault("rendered", {})
        return self.kept[products]

    @property
    def epsilon(self) -> float:
        """The relative rounding of its products."""
        return _EPSILON.get(self.products, torch.finfo(self.dtype).eps)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.network.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's parameters."""
        return self.network.dtype

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and continuation together."""
        return max_length(self.network)

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end the model's turn."""
        ids = self.network.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return sorted({*ids, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])})

    def tokenize(self, prompt: str, system_prompt: str = "default", answer: str = "") -> Int[Tensor, " seq"]:
        """The token ids of a user `prompt` in the chat template, up to the model's turn, followed by those of `answer`.

        `system_prompt` is `default` (the template's own), `none` (no system turn, even if the template would add one),
        or the text of the system turn. A model without a chat template gets the bare prompt. The ids are int64.

        Raises:
            UserError: the prompt is empty or exceeds the model's context, or the chat template does not fit (`chat`).
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: give the text that the model should answer")
        text = self.rendered(prompt, system_prompt) + answer
        templated = self.tokenizer.chat_template is not None
        ids = self.tokenizer(text, add_special_tokens=not templated, return_tensors="pt")["input_ids"][0]
        if len(ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.max_length}: shorten it"
            )
        return ids

    def rendered(self, prompt: str, system_prompt: str = "default") -> str:
        """The chat text up to the beginning of the model's turn; a run's prompts stay as first rendered."""
        kept = self.kept.get("rendered", {}).get((prompt, system_prompt))
        return chat(self.tokenizer, self.name, prompt, system_prompt) if kept is None else kept

    def fingerprint(self) -> str:
        """A hash of the configuration and weights (`fingerprint.fingerprint`)."""
        return fingerprint(self.network.config, self.network.state_dict())
