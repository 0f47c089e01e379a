"""Reading steering vectors from files of this project and of other tools, without executing code from them.

Layer N of a file is the output of decoder block N, counted from 0: `hidden_states[N + 1]`, `blocks.N.hook_resid_post`.
"""

import base64
import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.formats.gguf_file import read_gguf

LIMIT = 1 << 30
"""Bytes of a file, and of what it unpacks to, above which it is refused: 1,558 vectors of d_model 8,192 take 51 MB."""

ByLayer = Mapping[Any, Any]
"""The vectors of a file by layer, each (d_model,) or (n, d_model); None where the file does not say which layer."""


def read_vectors(path: str, d_model: int, layer: int | None = None) -> Float[Tensor, "n d_model"]:
    """The vectors of a file, float32, in its order; of a file that names layers, those of `layer`.

    A file is recognised by its suffix (`READERS`). Rows are vectors; in a matrix of d_model rows and another number of
    columns, which is how DCT writes them, columns are. Code in the file is never executed.

    Raises:
        UserError: no such file, another format, another shape, not finite, or no vectors of this layer.
    """
    suffix = Path(path).suffix
    if suffix not in READERS:
        raise UserError(f"cannot read vectors from {path!r}: expected a file {', '.join(READERS)}")
    try:
        found = READERS[suffix](_bytes(path))
        if not found:
            raise UserError("it holds no vectors")
        picked = next(iter(found.values())) if layer is None and len(found) == 1 else found.get(layer, found.get(None))
        if picked is None:
            raise UserError(f"its vectors are for layer {_listed(found)}, not {layer}: choose that as `source_layer`")
        return _rows(picked, d_model)
    except UserError as error:
        raise UserError(f"cannot read vectors from {path!r}: {error}") from None
    # Whatever a library raises over bytes that it does not understand.
    except Exception as error:
        raise UserError(f"cannot read vectors from {path!r}: malformed or truncated ({type(error).__name__})") from None


def _bytes(path: str) -> bytes:
    if not Path(path).is_file():
        raise UserError("there is no such file")
    if (size := Path(path).stat().st_size) > LIMIT:
        raise UserError(f"it has {size / 1e9:.1f} GB, and at most {LIMIT / 1e9:.1f} are read")
    return Path(path).read_bytes()


def _listed(found: ByLayer) -> str:
    return ", ".join(map(str, found))


def _rows(found: Any, d_model: int) -> Float[Tensor, "n d_model"]:
    """The vectors as rows, float32."""
    if isinstance(found, np.ndarray):
        if found.dtype.kind not in "fiu":
            raise UserError(f"its entries are of type {found.dtype}: expected numbers")
        found = torch.from_numpy(np.array(found, dtype=np.float32))
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta or found.is_complex():
        raise UserError("it holds no single tensor of shape (d_model,) or (n, d_model)")
    if found.ndim not in {1, 2} or not found.numel():
        raise UserError(f"it holds a tensor of shape {tuple(found.shape)}: expected shape (d_model,) or (n, d_model)")
    # A view may claim more entries than there are bytes.
    if found.numel() * found.element_size() > max(found.untyped_storage().nbytes(), 1):
        raise UserError("its tensor is larger than what is stored of it")
    rows = found.detach().reshape(-1, found.shape[-1]).float()
    if found.ndim == 2 and rows.shape[0] == d_model:
        if rows.shape[1] == d_model:
            raise UserError("its matrix is square, so vectors may be rows or columns: save fewer of them, as rows")
        rows = rows.T.contiguous()
    if rows.shape[-1] != d_model:
        raise UserError(f"its vectors have {rows.shape[-1]} entries, the model's d_model is {d_model}")
    if not torch.isfinite(rows).all():
        raise UserError("a vector in it is not finite")
    return rows


def _npy(data: bytes) -> np.ndarray:
    """An array of NumPy's format; its size is compared with the bytes before memory is taken."""
    buffer = io.BytesIO(data)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = headers[np.lib.format.read_magic(buffer)](buffer)
    if dtype.hasobject:
        raise UserError("it holds Python objects: expected numbers")
    rest = data[buffer.tell() :]
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError("size")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if columns_first else "C")


def _npz(data: bytes) -> ByLayer:
    with _unpackable(data) as archive:
        return _by_layer({name.removesuffix(".npy"): _npy(archive.read(name)) for name in archive.namelist()})


def _unpackable(data: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(data))
    if sum(entry.file_size for entry in archive.infolist()) > LIMIT:
        raise UserError(f"it unpacks to more than {LIMIT / 1e9:.1f} GB")
    return archive


def _safetensors(data: bytes) -> ByLayer:
    from safetensors.torch import load

    (size,) = struct.unpack_from("<Q", data)
    about = json.loads(data[8 : 8 + size]).get("__metadata__", {}) if size < len(data) else {}
    found = _by_layer(load(data))
    return {int(about["layer"]): found[None]} if None in found and about.get("format") == "melbo_ray" else found


def _pt(data: bytes) -> ByLayer:
    """A tensor, or a dictionary of tensors as one of the tools writes it.

    Files from before PyTorch 1.6 are refused: their sizes cannot be checked before memory is taken.
    """
    if not data.startswith(b"PK"):
        raise UserError("it is not in PyTorch's format since 1.6: load it, and save it again")
    with _unpackable(data):
        pass
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        if "weights_only" in str(error).lower():
            raise UserError("it holds more than tensors, and objects are not loaded: save the tensor alone") from None
        raise
    return _of_dictionary(found) if isinstance(found, Mapping) else {None: found}


def _of_dictionary(found: Mapping[Any, Any]) -> ByLayer:
    if isinstance(inner := found.get("layer_activations"), Mapping):  # steering-vectors
        if found.get("layer_type", "decoder_block") != "decoder_block":
            raise UserError(f"its vectors are for {found['layer_type']!r}: expected decoder_block, the residual stream")
        return _by_layer(inner)
    source = found.get("source_layer")
    if "vectors" in found:  # power-steering: a bias of block s, added to its output
        return {source if isinstance(source, int) else None: found["vectors"]}
    if "V" in found:  # DCT: columns, added to the input of block s
        return {source - 1 if isinstance(source, int) else None: found["V"].T}
    if all(isinstance(value, Mapping) and "action" in value for value in found.values()):  # lm-eval
        return _by_layer({name: _of_lm_eval(value) for name, value in found.items()})
    return _by_layer(found)


def _of_lm_eval(step: Mapping[str, Any]) -> Tensor:
    if step["action"] != "add" or step.get("head_index") is not None or step.get("bias") is not None:
        raise UserError(f"it does not add a vector to the residual stream (action {step['action']!r})")
    return step["steering_vector"] * float(step.get("steering_coefficient", 1.0))


def _json(data: bytes) -> ByLayer:
    """AISteer360's `.svec`, or the requests of vllm-lens."""
    found = json.loads(data)
    if isinstance(found, dict) and "directions" in found:
        return _by_layer({name: np.asarray(value, np.float32) for name, value in found["directions"].items()})
    (request,) = found if isinstance(found, list) else [found]
    if request.get("norm_match") or request.get("position_indices"):
        raise UserError("it is scaled to each token's norm, or for single positions: expected one vector for all")
    packed = request["activations"]
    dtype, shape = np.dtype(packed["dtype"]), packed["shape"]
    raw, size = base64.b64decode(packed["data"]), math.prod(shape) * dtype.itemsize
    if not 0 <= size <= LIMIT or dtype.kind != "f" or len(shape) != 2:
        raise UserError(f"its activations are {packed['dtype']} of shape {shape}: expected floats, (layers, d_model)")
    if packed.get("compression") == "zstd":
        raw = pa.decompress(raw, decompressed_size=size, codec="zstd", asbytes=True)
    rows = np.frombuffer(raw, dtype).reshape(shape) * np.float32(request.get("scale", 1.0))
    return dict(zip(map(int, request["layer_indices"]), rows, strict=True))


def _by_layer(named: Mapping[Any, Any]) -> ByLayer:
    """Tensors by the number that all their names end in (`8`, `layers.8`, `direction.8`), or the only one."""
    numbers = {name: re.search(r"(?:^|\.)(\d{1,6})$", str(name)) for name in named}
    if len(named) != 1 and not all(numbers.values()):
        names = ", ".join(str(name)[:40] for name in list(named)[:5])
        raise UserError(f"it holds no single tensor but {len(named)} ({names}): expected names that end in a layer")
    return {int(number[1]) if number else None: named[name] for name, number in numbers.items()}


READERS: dict[str, Callable[[bytes], ByLayer]] = {
    ".safetensors": _safetensors,
    ".npy": lambda data: {None: _npy(data)},
    ".npz": _npz,
    ".pt": _pt,
    ".gguf": read_gguf,
    ".svec": _json,
    ".json": _json,
}
"""The reader of each format, by the file's suffix."""
