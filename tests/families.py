"""Tiny language models of every family, with random weights and a tokenizer of bytes: no download, no weights."""

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from melbo_ray.model.language_model import LanguageModel

D_MODEL, NUM_LAYERS, END = 32, 4, 256
PROMPT = torch.arange(40, 60)
_COMMON: dict[str, Any] = {
    "vocab_size": 260, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 257,
    "bos_token_id": 258, "eos_token_id": END,
}  # fmt: skip
_LLAMA: dict[str, Any] = _COMMON | {
    "hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 8,
}  # fmt: skip
_SIZES = {
    "gpt2": _COMMON | {"n_embd": D_MODEL, "n_layer": NUM_LAYERS, "n_head": 4},
    "gpt_neox": _LLAMA,
}
_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig,
    "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "phi3": Phi3Config, "gpt2": GPT2Config,
    "gpt_neox": GPTNeoXConfig,
}  # fmt: skip
FAMILIES = list(_CONFIGS)
_TYPES = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_PER_LAYER = _LLAMA | _TYPES | {
    "vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
_OTHERS: dict[str, Any] = {
    "bloom": (BloomConfig, _COMMON | {"hidden_size": D_MODEL, "n_layer": NUM_LAYERS, "n_head": 4}),
    "gemma3n": (Gemma3nTextConfig, _PER_LAYER | {
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    }),
    "gemma4": (Gemma4TextConfig, _PER_LAYER | {"global_head_dim": 8}),
    "gemma4-shared": (Gemma4TextConfig, _PER_LAYER | {"global_head_dim": 8, "num_kv_shared_layers": 2}),
    "lfm2": (Lfm2Config, _LLAMA | {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "llama4": (Llama4TextConfig, _LLAMA | {
        "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64,
    }),
    "mamba2": (Mamba2Config, _COMMON | {
        "hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS, "num_heads": 8, "head_dim": 8, "state_size": 8,
        "n_groups": 1,
    }),
    "mpt": (MptConfig, _COMMON | {"d_model": D_MODEL, "n_layers": NUM_LAYERS, "n_heads": 4, "max_seq_len": 256}),
    "qwen3-next": (Qwen3NextConfig, _LLAMA | {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    }),
}  # fmt: skip
"""Families that need something of their own: their configurations and sizes."""
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def tiny(family: str = "llama", **options: int) -> LanguageModel:
    """A model of this family with random weights, the same at every call; `options` override its configuration."""
    kind, sizes = _OTHERS.get(family) or (_CONFIGS[family], _SIZES.get(family, _LLAMA))
    config = kind(**(sizes | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
    return LanguageModel.wrap(network, byte_tokenizer(), name=f"tiny-{family}")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the end, padding and start tokens; no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*alphabet, "<end>", "<pad>", "<start>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", bos_token="<start>"
    )


def directions(count: int, norm: float = 3.0, d_model: int = D_MODEL, seed: int = 0) -> torch.Tensor:
    """Random vectors of the given norm, (count, d_model)."""
    draws = torch.randn(count, d_model, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draws, dim=-1) * norm


def plain_logits(model: LanguageModel, tokens: torch.Tensor, source: int, theta: torch.Tensor) -> torch.Tensor:
    """Logits at every position, (seq, vocab), from transformers and a forward hook of the test's own."""

    def add(_layer, _args, output):
        return (output[0] + theta, *output[1:]) if isinstance(output, tuple) else output + theta

    handle = model.layers[source].register_forward_hook(add)
    with torch.no_grad():
        logits = model.network(tokens[None].to(model.device)).logits[0]
    handle.remove()
    return logits


def plain_hidden_states(
    model: LanguageModel, tokens: torch.Tensor, source: int, theta: torch.Tensor
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Hidden states of transformers under a hook of the test's own; entry ℓ + 1 is the output of block ℓ."""

    def add(_layer, _args, output):
        return (output[0] + theta, *output[1:]) if isinstance(output, tuple) else output + theta

    handle = model.layers[source].register_forward_hook(add)
    captured = []
    # The last entry of hidden_states has passed the final norm, so block outputs are read by hooks.
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: captured.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.layers
    ]
    with torch.no_grad():
        states = model.network(tokens[None], output_hidden_states=True).hidden_states
    for h in [handle, *handles]:
        h.remove()
    return captured, states
