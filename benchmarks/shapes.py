"""Models of a known shape with random weights and a tokenizer of bytes: nothing to download (bench.py, gpu.py)."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from melbo_ray.errors import UserError
from melbo_ray.model.language_model import LanguageModel

SHAPES = {
    "qwen1.5-1.8b": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=32768,
    ),
    "tiny": Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
    # Weights so large that the layers do something.
    "least": Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    ),
}  # fmt: skip
_MARKS = ["<end>", "<pad>", "<start>"]


def random_model(shape: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A model of this shape with seeded random weights.

    Raises:
        UserError: no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}: expected one of {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    return LanguageModel.wrap(network, byte_tokenizer(), name=shape)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the end, padding and start tokens; no chat template. Other ids are decoded to nothing."""
    words = {word: i for i, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *_MARKS])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, pad, start = _MARKS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, bos_token=start)
