"""The formula of memory, term by term, against what tiny models of every family hold."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from melbo_ray.cluster.memory import demands
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.host import resident_peak
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.partial import lower, sketch
from melbo_ray.model.products import BFLOAT16, TF32
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import generate
from tests.families import directions, every_family, tiny
from tests.model.test_products import multiplies

ROOT = Path(__file__).parents[2]

CODE = load_concept("code")
LAYERS: dict[str, Any] = {"source_layer": 0, "target_layer": 2}


def demanded(model, **options):
    return demands(model, Config(**LAYERS, **options), [CODE])


def held(model):
    return sum(parameter.nbytes for parameter in model.network.parameters())


def packed_values(recorded):
    """Weights in the packed copies of a function that is recorded once."""
    (module,) = recorded._recordings.values()
    return sum(value.numel() for name, value in module.named_buffers() if name.startswith("weight"))


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_each_worker_loads(tmp_path, family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    config = Config(model=str(tmp_path), device="cpu", **LAYERS)
    found = demands(sketch(config), config, [CODE])
    assert (found.chain.weights, found.evaluator.weights) == (held(lower(config)), held(model))


@every_family
def test_packed_copies_are_those_of_the_slice_forward_and_backward(family):
    model = tiny(family)
    slice = Slice(model, [torch.arange(40, 60)], **{name.split("_")[0]: layer for name, layer in LAYERS.items()})
    slice.value_and_grad(directions(1), directions(1, seed=1), torch.tensor([0]))
    assert demanded(model).chain.packed == pytest.approx(4 * packed_values(slice.value_and_grad), rel=0.01)


@every_family
def test_packed_copies_of_an_evaluator_are_those_of_every_layer_and_the_head_and_of_a_slice_for_shuffled(family):
    # A model of its own: what generate keeps of one is for all its uses.
    model = dataclasses.replace(tiny(family))
    generate(model, [Request(torch.arange(40, 60), directions(1)[0])] * 2, 1, max_new_tokens=6)
    texts = demanded(model, evals=["kl", "generations"])
    assert texts.evaluator.packed == pytest.approx(4 * packed_values(model.kept["batch"].decode), rel=0.01)
    assert demanded(model).evaluator.packed == texts.evaluator.packed + texts.chain.packed


@multiplies
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rounded_copies_are_those_of_every_layer_for_an_evaluator_alone(family):
    model = tiny(family).multiplied(BFLOAT16)
    generate(model, [Request(torch.arange(40, 60), directions(1)[0])] * 2, 1, max_new_tokens=6)
    found, plain = demanded(model, eval_products=BFLOAT16), demanded(model)
    copies = sum(weight.nbytes for weight in model.kept["rounded weights"].values())
    assert (found.evaluator.rounded, found.chain.rounded, plain.evaluator.rounded) == (copies, 0, 0)
    assert found.evaluator.on_cpu(False) == plain.evaluator.on_cpu(False) + copies
    assert demanded(model, eval_products=TF32) == plain


@every_family
def test_what_the_backward_pass_keeps_is_near_what_autograd_saves(family):
    model, tokens, saved = tiny(family, hidden_size=64, intermediate_size=256), 1024, {}
    slice = Slice(model, [torch.arange(32)], 0, 2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}

    def keep(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return value

    theta = directions(tokens // 32, d_model=64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        h = slice.h_target(theta)
    assert h.requires_grad
    basis = 4 * 64 * Config().num_vectors
    kept = sum(storage.nbytes() for storage in saved.values())
    each = (demanded(model).chain.work - basis) / len(model.tokenize(CODE.prompt))
    assert 0.6 < each / (kept / tokens) < 1.6


def test_a_batch_of_texts_and_its_logits_are_counted_to_the_byte():
    model = dataclasses.replace(tiny("qwen2"))
    generate(model, [Request(model.tokenize(CODE.prompt), directions(1)[0])] * 2, 1, max_new_tokens=48)
    cache = model.kept["batch"].cache
    here = sum(value.nbytes for part in (cache.keys, cache.values) for value in part.values())
    shorter, longer = (demanded(model, candidates=1, max_new_tokens=count).evaluator.work for count in (48, 48 + 128))
    assert longer - shorter == here / model.kept["batch"].shape[1] * 128


def test_a_worker_is_asked_for_its_packed_copies_only_where_it_makes_them():
    found = demanded(tiny()).evaluator
    assert found.on_cpu(True) - found.on_cpu(False) == found.packed > 0
    assert found.on_gpu == found.weights + found.work_on_gpu < found.on_cpu(False)


@pytest.mark.parametrize(
    ("more", "worker", "shape"),
    [
        ({"num_vectors": 31}, "chain", {}),
        ({"candidates": 200}, "evaluator", {"intermediate_size": 4096}),
        ({"max_new_tokens": 400}, "evaluator", {}),
        ({"base": "contrast", "evals": ["hessian"]}, "evaluator", {"intermediate_size": 4096}),
    ],
)
def test_what_is_asked_grows_with_what_is_done(more, worker, shape):
    model = tiny(**shape)
    before, after = (getattr(demanded(model, **options), worker) for options in ({"num_vectors": 3}, more))
    assert after.work > before.work
    assert after.weights == before.weights


def test_weights_of_another_type_than_their_file_have_its_pages_beside_them():
    config = Config(**LAYERS)
    half, same = (demands(tiny(), config, [CODE], dtype).evaluator for dtype in (torch.bfloat16, torch.float32))
    assert (half.loading, same.loading) == (half.weights // 2, 0)
    large = dataclasses.replace(half, loading=1 << 40)
    assert large.on_cpu(True) - (1 << 40) == half.on_cpu(False) - half.work


def test_the_resident_peak_is_a_process_own_and_not_that_of_the_one_that_started_it():
    held = bytearray(1 << 30)
    code = "from melbo_ray.cluster.worker import resident_peak; print(resident_peak())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert resident_peak() >= len(held) > int(done.stdout)
