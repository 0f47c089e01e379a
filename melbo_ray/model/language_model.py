"""A language model: load it, turn a prompt into its tokens, find its decoder layers, fingerprint it."""

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


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model of transformers with its tokenizer.

    Attributes:
        network: the transformers model, in eval mode, no parameter requiring a gradient.
        tokenizer: its tokenizer.
        layers: its decoder layers, the first at index 0.
        name: as given to `load`.
        revision: the hub revision asked for, if any.
        packed: whether products on the CPU may have packed copies of it; None: of 4 GiB at most.
        kept: what those who use the model made once for all its uses (the batch of `generate`).
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    name: str = ""
    revision: str | None = None
    packed: bool | None = None
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
        """Load a hub id, a local directory, a GGUF file, or `smollm2` (SmolLM2-135M-Instruct from the package index).

        Weights come from safetensors or GGUF only, neither of which can execute code. With `device_map` accelerate
        places the layers, instead of `device`: `balanced` spreads them over all the GPUs that this process sees.
        `layers` is the dotted path of the decoder layers inside the network, where they are not found without it.

        Raises:
            UserError: no such model or layers, CUDA asked for and absent, or GPUs that do not hold the model.
        """
        place = pick_device("cuda" if device_map == BALANCED else device)
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
            network = network.to(place)
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
        """Freeze a transformers model that is already in memory; UserError where its layers cannot be told apart."""
        network.eval().requires_grad_(False)
        name = name or str(network.config.name_or_path)
        return cls(network, tokenizer, decoder_layers(network, layers), name, revision)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.network.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's parameters."""
        return self.network.dtype

    @property
    def max_length(self) -> int:
        """Most tokens the model takes, prompt and continuation together."""
        return max_length(self.network)

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end the model's turn."""
        ids = self.network.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return sorted({*ids, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])})

    def tokenize(self, prompt: str, system_prompt: str = "default", answer: str = "") -> Int[Tensor, " seq"]:
        """The token ids of a user's `prompt` in the chat template, up to where the model's turn begins, then `answer`.

        `system_prompt` is `default` (what the template itself puts there), `none` (no system turn at all, even where
        the template would add one), or the text of one. A model without a chat template gets the prompt bare.

        Raises:
            UserError: the prompt is empty, or longer than the model's context, or what `chat` raises.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: give the text that the model shall answer")
        text = self.rendered(prompt, system_prompt) + answer
        templated = self.tokenizer.chat_template is not None
        ids = self.tokenizer(text, add_special_tokens=not templated, return_tensors="pt")["input_ids"][0]
        if len(ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.max_length}: shorten it"
            )
        return ids

    def rendered(self, prompt: str, system_prompt: str = "default") -> str:
        """The text of the chat up to where the model's turn begins; a run's prompts stay as it was begun with."""
        kept = self.kept.get("rendered", {}).get((prompt, system_prompt))
        return chat(self.tokenizer, self.name, prompt, system_prompt) if kept is None else kept

    def fingerprint(self) -> str:
        """The `fingerprint` of its configuration and weights."""
        return fingerprint(self.network.config, self.network.state_dict())
