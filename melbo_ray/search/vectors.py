"""Steering vectors, and their conversion to and from rows of the table `vectors`.

A vector is `theta` in code and the column `vector` in the table, a list of float32, copied from and to Arrow's buffers.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import Certificate


@dataclass(frozen=True)
class BaseVector:
    """The base vector θ₀ of a chain.

    Attributes:
        theta: (d_model,) float32 on the CPU.
    """

    theta: Float[Tensor, " d_model"]

    @property
    def norm(self) -> float:
        """R = ‖θ₀‖ (residual-stream units)."""
        return float(self.theta.norm())


@dataclass(frozen=True)
class SteeringVector(Certificate):
    """A vector of a chain with its certificate.

    Attributes:
        index: position in the chain, from 1; the base is 0.
        theta: (d_model,) float32 on the CPU.
    """

    index: int
    theta: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class StoredVectors:
    """The stored vectors of a concept.

    Attributes:
        base: θ₀; None until it is found.
        chain: the chain's vectors in order, from index 1.
        avoided: orthonormal directions to which the chain is orthogonal, as is θ₀; (d_model,) float32 each.
    """

    base: BaseVector | None
    chain: list[SteeringVector]
    avoided: list[Float[Tensor, " d_model"]]


def row(run_id: str, kind: str, vector: BaseVector | SteeringVector, index: int = 0) -> dict[str, Any]:
    """The vector's row in the table `vectors`; a base has this `index`, and of the certificate's columns its norm."""
    names = [field.name for field in fields(Certificate)]
    if isinstance(vector, BaseVector):
        certificate = dict.fromkeys(names) | {"norm": vector.norm}
    else:
        index, certificate = vector.index, {name: getattr(vector, name) for name in names}
    return {"run_id": run_id, "kind": kind, "index": index, "vector": vector.theta.numpy(), **certificate}


def stored_vectors(run: Run, concept: str) -> StoredVectors:
    """The stored base and chain of a concept, and what the chain avoids, published or not."""
    rows = run.read("vectors", concept, of=("base", "chain"))
    # Chunk by chunk: all of them as one array would be a copy of the whole chain.
    chunks = (chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in rows["vector"].chunks if len(chunk))
    base, chain, avoided = None, [], []
    for facts, theta in zip(
        rows.drop_columns(["run_id", "vector"]).to_pylist(), itertools.chain.from_iterable(chunks), strict=True
    ):
        kind = facts.pop("kind")
        if kind == "base":
            base = BaseVector(_tensor(theta))
        elif kind == "avoided":
            avoided.append(_tensor(theta))
        elif kind == "chain":
            chain.append(SteeringVector(theta=_tensor(theta), **facts))
    return StoredVectors(base, chain, avoided)


def _tensor(values: Float[np.ndarray, " d_model"]) -> Float[Tensor, " d_model"]:
    # Copied: Arrow's buffers are read-only, and their alignment may change the last bits of products.
    return torch.tensor(values)
