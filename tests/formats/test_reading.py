"""Files of vectors of every tool are read; what is malformed ends in one line, whatever bytes it has."""

import base64
import io
import json
import pickle
import random
import struct
import tracemalloc
import zipfile

import gguf
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save, save_file

from melbo_ray.errors import UserError
from melbo_ray.formats import reading
from melbo_ray.formats.gguf_file import write_gguf
from melbo_ray.formats.reading import READERS, read_vectors
from tests.families import D_MODEL, directions

ROWS = directions(3)


def read(tmp_path, suffix, data, layer=None):
    path = tmp_path / f"v{suffix}"
    path.write_bytes(data)
    return read_vectors(str(path), D_MODEL, layer)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def array_saved(value, **options):
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def arrays_saved(**named):
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def gguf_of(tmp_path, directions, architecture="controlvector", **keys):
    """A control vector as the peers write it, by the `gguf` package."""
    writer = gguf.GGUFWriter(tmp_path / "made.gguf", architecture)
    for name, value in keys.items():
        writer.add_string(name.replace("_", "."), value)
    writer.add_array("some.strings", ["a", "bc"])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, value in directions.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "made.gguf").read_bytes()


LM_EVAL = {"action": "add", "steering_coefficient": 2.0, "steering_vector": ROWS[0] / 2, "bias": None}
FOREIGN = {
    "the reference repository: rows, the base first": (".pt", lambda: saved(ROWS), None, ROWS),
    "DCT: columns": (".pt", lambda: saved(ROWS.T.contiguous()), None, ROWS),
    "DCT: a parameter": (".pt", lambda: saved(torch.nn.Parameter(ROWS.T.contiguous())), None, ROWS),
    "DCT: at the input of block 9": (".pt", lambda: saved({"V": ROWS.T.clone(), "U": 1.0, "source_layer": 9}), 8, ROWS),
    "power-steering": (".pt", lambda: saved({"vectors": ROWS, "sigmas": [3.0, 2.0, 1.0], "source_layer": 8}), 8, ROWS),
    "steering-vectors": (".pt", lambda: saved({"layer_activations": {8: ROWS[0], 9: ROWS[1]}}), 9, ROWS[1:2]),
    "a dictionary by layer": (".pt", lambda: saved({8: ROWS[0], 9: ROWS[1]}), 8, ROWS[:1]),
    "lm-eval": (".pt", lambda: saved({"layers.8": LM_EVAL}), 8, ROWS[:1]),
    "npz": (".npz", lambda: arrays_saved(vectors=ROWS.numpy()), None, ROWS),
    "npz by layer": (".npz", lambda: arrays_saved(**{"layers.3": ROWS[0], "layers.4": ROWS[1]}), 4, ROWS[1:2]),
    "npy in Fortran's order": (".npy", lambda: array_saved(np.asfortranarray(ROWS.numpy())), None, ROWS),
    "npy in float64": (".npy", lambda: array_saved(ROWS.double().numpy()), None, ROWS),
    "safetensors": (".safetensors", lambda: save({"theta": ROWS}), None, ROWS),
    "safetensors by layer": (".safetensors", lambda: save({"d.8": ROWS[0], "d.9": ROWS[1]}), 9, ROWS[1:2]),
    "svec": (".svec", lambda: svec({"8": ROWS[:1].tolist()}), 8, ROWS[:1]),
    "svec, flat": (".svec", lambda: svec({"8": ROWS[0].tolist()}), 8, ROWS[:1]),
}  # fmt: skip


def svec(directions):
    return json.dumps({"model_type": "llama", "directions": directions}).encode()


@pytest.mark.parametrize(("suffix", "data", "layer", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_the_files_of_other_tools_are_read(tmp_path, suffix, data, layer, expected):
    assert torch.equal(read(tmp_path, suffix, data(), layer), expected)


def test_a_control_vector_of_llama_cpp_and_of_repeng_is_read(tmp_path):
    many = {f"direction.{layer}": row.numpy() for layer, row in zip((7, 8, 9), ROWS, strict=True)}
    data = gguf_of(tmp_path, many, controlvector_model_hint="llama")
    assert torch.equal(read(tmp_path, ".gguf", data, 8), ROWS[1:2])
    half = gguf_of(tmp_path, {"direction.8": ROWS[0].half().numpy()}, "steeringvector")
    assert torch.equal(read(tmp_path, ".gguf", half, 8), ROWS[:1].half().float())
    with pytest.raises(UserError, match=r"layer 7, 8, 9, not 3"):
        read(tmp_path, ".gguf", data, 3)


def test_a_request_of_vllm_lens_is_read_as_it_writes_it(tmp_path):

    raw = ROWS[:2].numpy().tobytes()
    packed = {
        "data": base64.b64encode(pa.compress(raw, codec="zstd", asbytes=True)).decode(), "dtype": "float32",
        "original_dtype": "torch.float32", "shape": [2, D_MODEL], "compression": "zstd",
    }  # fmt: skip
    request = {"activations": packed, "layer_indices": [4, 8], "scale": 2.0, "norm_match": False}
    assert torch.equal(read(tmp_path, ".json", json.dumps(request).encode(), 8), ROWS[1:2] * 2)
    with pytest.raises(UserError, match="norm"):
        read(tmp_path, ".json", json.dumps(request | {"norm_match": True}).encode(), 8)


class Hostile:
    def __reduce__(self):
        return print, ("this pickle was executed",)


REFUSED = {
    "code": (".pt", lambda: saved(Hostile()), "more than tensors"),
    "code in a dictionary": (".pt", lambda: saved({"vectors": ROWS, "more": Hostile()}), "more than tensors"),
    "a bare pickle of code": (".pt", lambda: pickle.dumps(Hostile()), "format since 1.6"),
    "code in npy": (".npy", lambda: array_saved(np.array([Hostile()], dtype=object), allow_pickle=True), "objects"),
    "code in npz": (".npz", lambda: arrays_saved(a=np.array([Hostile()], dtype=object)), "objects"),
    "nothing": (".pt", lambda: b"", "format since 1.6"),
    "an empty dictionary": (".pt", lambda: saved({}), "no vectors"),
    "not finite": (".npy", lambda: array_saved(np.full(D_MODEL, np.inf)), "not finite"),
    "another width": (".npy", lambda: array_saved(np.ones((4, 31))), "31 entries"),
    "a square": (".pt", lambda: saved(torch.eye(D_MODEL)), "square"),
    "three dimensions": (".npy", lambda: array_saved(np.ones((1, 2, D_MODEL))), "shape"),
    "text": (".npy", lambda: array_saved(np.array(["a"])), "numbers"),
    "several tensors": (".safetensors", lambda: save({"a": ROWS, "b": ROWS * 1}), "single tensor but 2"),
    "another place": (".pt", lambda: saved({"layer_activations": {8: ROWS[0]}, "layer_type": "mlp"}), "decoder_block"),
    "clamping": (".pt", lambda: saved({"layers.8": LM_EVAL | {"action": "clamp"}}), "does not add"),
    "a view that claims more": (".pt", lambda: saved(torch.ones(1).expand(9, D_MODEL)), "larger than what is stored"),
    "complex numbers": (".pt", lambda: saved(torch.ones(D_MODEL, dtype=torch.complex64)), "no single tensor"),
    "a sparse tensor": (".pt", lambda: saved(torch.eye(3, D_MODEL).to_sparse()), ""),
}


@pytest.mark.parametrize(("suffix", "data", "said"), REFUSED.values(), ids=REFUSED)
def test_what_will_not_do_is_refused_in_a_line(tmp_path, capsys, suffix, data, said):
    with pytest.raises(UserError) as refusal:
        read(tmp_path, suffix, data())
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "executed" not in capsys.readouterr().out


def test_the_hostile_pickle_would_run(capsys):
    pickle.loads(pickle.dumps(Hostile()))
    assert "executed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("directions", "architecture", "said"),
    [
        ({"blk.0.weight": ROWS[0].numpy()}, "llama", "a GGUF of 'llama'"),
        ({"token_embd.weight": ROWS[0].numpy()}, "controlvector", "a tensor 'token_embd.weight'"),
        ({"direction.8": ROWS.numpy()}, "controlvector", "2 dimensions"),
        ({"direction.8": np.zeros(D_MODEL, np.int32)}, "controlvector", "quantised"),
        ({"direction.x": ROWS[0].numpy()}, "controlvector", "a tensor 'direction.x'"),
        ({}, "controlvector", "no vectors"),
    ],
)
def test_a_gguf_of_another_kind_is_refused_in_a_line(tmp_path, directions, architecture, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, ".gguf", gguf_of(tmp_path, directions, architecture))


def test_sizes_are_checked_before_memory_is_taken(tmp_path, monkeypatch):
    blown = array_saved(ROWS.numpy()).replace(b"(3, 32)", b"(9999999999999, 32)".replace(b" ", b""))
    counts = b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 64
    header = struct.pack("<Q", 1 << 60) + b"{}"
    packed = json.dumps({"activations": {"data": "", "dtype": "float32", "shape": [1 << 40, 32]}, "layer_indices": [1]})
    tracemalloc.start()
    for suffix, data in {".npy": blown, ".gguf": counts, ".safetensors": header, ".json": packed.encode()}.items():
        with pytest.raises(UserError):
            read(tmp_path, suffix, data)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\0" * 100_000)
    monkeypatch.setattr(reading, "LIMIT", 50_000)
    with pytest.raises(UserError, match="unpacks to more"):
        read(tmp_path, ".npz", bomb.getvalue())
    with pytest.raises(UserError, match="at most"):
        read(tmp_path, ".npy", b"\0" * 60_000)


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    for name in ("none.npy", "folder.npy"):
        with pytest.raises(UserError, match="no such file"):
            read_vectors(str(tmp_path / name), D_MODEL)
    with pytest.raises(UserError, match="expected a file"):
        read_vectors(str(tmp_path / "v.onnx"), D_MODEL)


def corpus(tmp_path):
    """A valid file for each suffix, several for those of many forms."""
    write_gguf(tmp_path / "c.gguf", 8, ROWS[0].numpy(), "llama", "a control vector")
    save_file({"vectors": ROWS}, tmp_path / "c.safetensors", {"format": "melbo_ray", "layer": "8"})
    request = {"data": "", "dtype": "float32", "shape": [1, D_MODEL]}

    request["data"] = base64.b64encode(ROWS[0].numpy().tobytes()).decode()
    return {
        ".gguf": [(tmp_path / "c.gguf").read_bytes()],
        ".safetensors": [(tmp_path / "c.safetensors").read_bytes()],
        ".npy": [array_saved(ROWS.numpy())],
        ".npz": [arrays_saved(vectors=ROWS.numpy())],
        ".pt": [saved(ROWS), saved({"layer_activations": {8: ROWS[0]}}), saved({"layers.8": LM_EVAL})],
        ".svec": [svec({"8": ROWS[:1].tolist()})],
        ".json": [json.dumps([{"activations": request, "layer_indices": [8], "scale": 1.0}]).encode()],
    }


def mutated(data, draw):
    """The bytes truncated, with bits flipped, with a length blown up, or with a piece doubled or cut out."""
    data, kind = bytearray(data), draw.randrange(5)
    place = draw.randrange(min(len(data), 400) if draw.random() < 0.7 else len(data))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[place : place + 8] = struct.pack("<Q", draw.choice([1 << 63, (1 << 64) - 1, 1 << 40, 1 << 31, 0]))
    elif kind == 3:
        data[place:place] = data[place : place + draw.randint(1, 64)] * draw.randint(1, 4)
    else:
        del data[place : place + draw.randint(1, 64)]
    return bytes(data)


@pytest.mark.parametrize("suffix", READERS)
def test_mutated_files_are_read_or_refused_in_a_line(tmp_path, suffix):
    draw, files, said = random.Random(f"mutated{suffix}"), corpus(tmp_path)[suffix], []
    for data in files:
        assert torch.isfinite(read(tmp_path, suffix, data, 8)).all()
    for number in range(240):
        try:
            found = read(tmp_path, suffix, mutated(files[number % len(files)], draw), 8)
        except UserError as error:
            said.append(str(error))
            continue
        assert found.shape[1] == D_MODEL
        assert torch.isfinite(found).all()
    assert len(said) > 60
    assert not [line for line in said if "\n" in line]
