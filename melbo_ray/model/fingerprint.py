"""The identity of a model: a hash of its configuration and weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLED_PER_TENSOR = 4096


def fingerprint(config: Any, weights: Mapping[str, Tensor]) -> str:
    """A hash of a transformers configuration and of the weights' names, shapes, dtypes and evenly sampled values.

    About 4,096 values of each tensor are hashed, so that a model of 70B parameters takes seconds. The hash tells models
    apart, does not depend on the device, and does not protect against tampering.
    """
    facts = config.to_dict()
    for moving in ("_name_or_path", "transformers_version"):
        facts.pop(moving, None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in sorted(weights.items()):
        flat = value.reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLED_PER_TENSOR)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
