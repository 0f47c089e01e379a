"""Runs other tools' own code on vectors that were exported for them; a process in an environment of theirs.

    PYTHON benchmarks/parity_peer.py FOLDER        # what benchmarks/parity.py wrote

It imports nothing of melbo_ray, whose requirements some tools contradict, and prints a JSON object for each tool that
can be imported: the largest difference of logits at the prompt's last token from melbo_ray's, and of how many greedy
tokens the first are the same.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import struct
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Logits = Callable[[list[int]], np.ndarray]
"""Logits of the next token after these tokens, (vocab,) float32, under the vector."""


class Case:
    """What the parent wrote: the model's folder, the prompt, the vector's files, what melbo_ray computes.

    Attributes:
        told: `model`, `gguf`, `tokens` of the prompt, `layer`, and `files` by format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.told: dict[str, Any] = json.loads((folder / "case.json").read_text("utf-8"))

    def file(self, format: str) -> str:
        """Path of the file in a format."""
        return str(self.folder / self.told["files"][format])

    def use(self, format: str, tool: str) -> str:
        """The code of the file's sidecar for a tool."""
        return json.loads(Path(self.file(format) + ".sidecar.json").read_text("utf-8"))["use"][tool]

    def model(self) -> Any:
        """The model of transformers, float32 with eager attention."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.told["model"], dtype=torch.float32).eval()


def _last(logits: Any) -> np.ndarray:
    return logits[0, -1].detach().float().numpy()


def _plain(case: Case) -> Logits:
    model = case.model()
    names = {"torch": torch, "numpy": np, "model": model}
    exec(case.use("npy", "transformers"), names)
    return lambda tokens: _last(model(torch.tensor([tokens])).logits)


def _null(case: Case) -> Logits:
    model = case.model()
    return lambda tokens: _last(model(torch.tensor([tokens])).logits)


def _repeng(case: Case) -> Logits:
    names: dict[str, Any] = {"repeng": importlib.import_module("repeng"), "model": case.model()}
    exec(case.use("gguf", "repeng"), names)
    return lambda tokens: _last(names["model"](torch.tensor([tokens])).logits)


def _dialz(case: Case) -> Logits:
    dialz = importlib.import_module("dialz")
    # It always loads float16 weights, so those of float32 are put in their place before the vector is set.
    load, set_control = case.use("gguf", "dialz").split("\n")
    names: dict[str, Any] = {"dialz": dialz, "name": case.told["model"]}
    exec(load, names)
    inner, exact = names["model"].model.float(), case.model().state_dict()
    inner.load_state_dict({name: exact[name.replace(".block.", ".")] for name in inner.state_dict()})
    exec(set_control, names)
    return lambda tokens: _last(names["model"](torch.tensor([tokens])).logits)


def _steering_vectors(case: Case) -> Logits:
    vectors, model = importlib.import_module("steering_vectors"), case.model()
    code = case.use("steering-vectors", "steering-vectors")

    def logits(tokens: list[int]) -> np.ndarray:
        names = {"SteeringVector": vectors.SteeringVector, "torch": torch, "model": model}
        names["tokens"] = torch.tensor([tokens])
        exec(code, names)
        return _last(names["logits"])

    return logits


def _nnsight(case: Case) -> Logits:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.told["model"])
    model = importlib.import_module("nnsight").LanguageModel(case.model(), tokenizer=tokenizer)
    # A file, as nnsight reads the source of the block that it traces.
    body = textwrap.indent(case.use("npy", "nnsight"), "    ")
    place = case.folder / "nnsight_code.py"
    place.write_text(f"import numpy, torch\n\n\ndef run(model, tokens):\n{body}\n    return logits\n", "utf-8")
    spec = importlib.util.spec_from_file_location("nnsight_code", place)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return lambda tokens: _last(code.run(model, torch.tensor([tokens])))


def _transformer_lens(case: Case) -> Logits:
    bridges = importlib.import_module("transformer_lens.model_bridge")
    bridge = bridges.TransformerBridge.boot_transformers(case.told["model"], device="cpu", dtype=torch.float32)
    code = case.use("npy", "TransformerLens")

    def logits(tokens: list[int]) -> np.ndarray:
        names = {"torch": torch, "numpy": np, "bridge": bridge, "tokens": torch.tensor([tokens])}
        exec(code, names)
        return _last(names["logits"])

    return logits


def _lm_eval(case: Case) -> Logits:
    steered = importlib.import_module("lm_eval.models.hf_steered").SteeredModel
    model = steered(case.told["model"], case.file("lm-eval"), device="cpu", dtype="float32")
    return lambda tokens: _last(model._model_call(torch.tensor([tokens])))


def _llama_cpp(case: Case, steered: bool = True) -> Logits:
    """llama.cpp on the GGUF model, with the loader of its command line.

    The library is that of xllamacpp, which has the loader; the bindings are those of llama_cpp_py_sync, of one release.
    """
    library = importlib.import_module("xllamacpp.xllamacpp").__file__
    size, data = _control_vector(ctypes.CDLL(library), case.file("gguf"))
    bindings = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    vars(bindings)["_find_library"] = lambda: library
    llama_cpp = importlib.import_module("llama_cpp_py_sync")
    model = llama_cpp.Llama(case.told["gguf"], n_ctx=512, n_threads=1, verbose=False, flash_attn_type=0)
    lib, ffi, context = model._lib, model._ffi, model._ctx
    layers = lib.llama_model_n_layer(model._model)
    if steered:
        pointer = ffi.cast("float *", data.ctypes.data)
        assert lib.llama_set_adapter_cvec(context, pointer, len(data), size, 1, layers) == 0

    def logits(tokens: list[int]) -> np.ndarray:
        model._clear_context_state()
        model._eval_tokens(tokens, 0)
        row = ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * model.n_vocab)
        return np.frombuffer(row, np.float32).copy()

    return logits


def _control_vector(library: ctypes.CDLL, file: str) -> tuple[int, np.ndarray]:
    """What llama.cpp's loader, a C++ function, makes of a file: the width, and the vectors of layers 1 and on.

    Its argument is std::vector<{float strength; std::string fname}>, its result {int n_embd; std::vector<float> data},
    laid out as libstdc++ does with the strings from before C++11, a pointer behind {length, capacity, references}.
    """
    load = library._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE
    load.argtypes, load.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    name = file.encode()
    text = ctypes.create_string_buffer(struct.pack("<QQQ", len(name), len(name), 1000) + name)
    info = ctypes.create_string_buffer(struct.pack("<f4xQ", 1.0, ctypes.addressof(text) + 24), 16)
    start = ctypes.addressof(info)
    files = ctypes.create_string_buffer(struct.pack("<QQQ", start, start + 16, start + 16), 24)
    result = ctypes.create_string_buffer(32)
    load(ctypes.addressof(result), ctypes.addressof(files))
    size, first, last, _ = struct.unpack("<i4xQQQ", result.raw)
    if size < 1:
        raise ValueError("llama.cpp refuses the control vector")
    return size, np.frombuffer(ctypes.string_at(first, last - first), np.float32).copy()


def _llama_cpp_unsteered(case: Case) -> Logits:
    return _llama_cpp(case, steered=False)


PEERS: dict[str, tuple[str, str, Callable[[Case], Logits]]] = {
    "transformers, the sidecar's hook": ("transformers", "npy", _plain),
    "no vector": ("transformers", "–", _null),
    "repeng": ("repeng", "gguf", _repeng),
    "dialz": ("dialz", "gguf", _dialz),
    "steering-vectors": ("steering_vectors", "steering-vectors", _steering_vectors),
    "nnsight": ("nnsight", "npy", _nnsight),
    "TransformerLens": ("transformer_lens", "npy", _transformer_lens),
    "lm-eval": ("lm_eval", "lm-eval", _lm_eval),
    "llama.cpp": ("xllamacpp", "gguf", _llama_cpp),
    "llama.cpp, without the vector": ("xllamacpp", "–", _llama_cpp_unsteered),
}
"""The tools: module to import, format of the file, and what makes their logits."""
EXPECTED = {"no vector": "model", "llama.cpp": "gguf", "llama.cpp, without the vector": "unsteered"}
"""What of melbo_ray's a tool is compared with, where it is not the model of transformers under the vector."""


def compare(case: Case, logits: Logits, expected: np.ndarray, greedy: list[int]) -> dict[str, Any]:
    """The largest difference of logits after the prompt, and of how many greedy tokens the first are the same."""
    found = logits(case.told["tokens"])
    tokens, same = list(case.told["tokens"]), 0
    for token in greedy:
        if int(logits(tokens).argmax()) != token:
            break
        tokens, same = [*tokens, token], same + 1
    size = min(len(found), len(expected))
    return {"difference": float(np.abs(found[:size] - expected[:size]).max()), "same": same, "of": len(greedy)}


def main() -> None:
    """Print a line of JSON for each tool of this environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    case, saved = Case(options.folder), np.load(options.folder / "expected.npz")
    os.chdir(case.folder)  # the sidecars' code names the files beside them
    torch.set_num_threads(1)
    for name, (module, format, make) in PEERS.items():
        kind = EXPECTED.get(name, "model")
        if importlib.util.find_spec(module) is None or f"{kind}_logits" not in saved:
            continue
        row = {"peer": name, "format": format, "transformers": importlib.metadata.version("transformers")}
        row["version"] = importlib.metadata.version(module)
        try:
            with torch.no_grad():
                row |= compare(case, make(case), saved[f"{kind}_logits"], saved[f"{kind}_greedy"].tolist())
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
