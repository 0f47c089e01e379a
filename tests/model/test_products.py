"""Rounded products, against a network in which every linear layer but the head rounds by itself."""

import copy

import pytest
import torch

from melbo_ray.errors import UserError
from melbo_ray.model import plain, products
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.products import BFLOAT16, FLOAT32, TF32, require_products
from melbo_ray.model.sampling import generate
from melbo_ray.model.steering import Prompts
from tests.families import PROMPT, directions, tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOURCE = 1
multiplies = pytest.mark.skipif(not products._multiplies_bfloat16(), reason="this processor has no bfloat16 products")


def rounding_by_itself(model):
    """A copy of the model whose linear layers round both factors and the product; sums are float32."""
    network = copy.deepcopy(model.network)

    def forward(self, x):
        product = (x.bfloat16().float() @ self.weight.bfloat16().float().T).bfloat16().float()
        return product if self.bias is None else product + self.bias

    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and module is not network.get_output_embeddings():
            module.forward = forward.__get__(module)
    return LanguageModel.wrap(network, model.tokenizer)


@multiplies
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_logits_are_those_of_layers_that_round_by_themselves(family):
    model, thetas = tiny(family), directions(4, norm=5.0)
    expected = plain.logits(rounding_by_itself(model), PROMPT, SOURCE, thetas, 1)[:, 0]
    exact = plain.logits(model, PROMPT, SOURCE, thetas, 1)[:, 0]
    ours = torch.cat(list(Prompts(model.multiplied(BFLOAT16), [PROMPT], SOURCE).logits(thetas)))
    rounding = (expected - exact).norm()
    assert rounding > 1e-3 * exact.norm()
    assert (ours - expected).norm() < 0.2 * rounding
    torch.testing.assert_close(torch.cat(list(Prompts(model, [PROMPT], SOURCE).logits(thetas))), exact)


@multiplies
def test_texts_are_decoded_with_rounded_products_of_every_layer_and_the_float32_head():
    model = tiny("qwen2").multiplied(BFLOAT16)
    requests = [Request(PROMPT, theta, temperature=0) for theta in directions(2, norm=5.0)]
    generate(model, requests, SOURCE, max_new_tokens=4)
    (recording,) = model.kept["batch"].decode._recordings.values()
    products = [node for node in recording.graph.nodes if "linear_pointwise" in str(node.target)]
    dtypes = [getattr(recording, node.args[1].target).dtype for node in products]
    assert dtypes.count(torch.bfloat16) == 7 * len(model.layers)
    assert dtypes.count(torch.float32) == 1


def test_a_model_and_its_rounded_one_share_weights_and_rendered_prompts_only():
    model = tiny()
    rounded = model.multiplied(TF32)
    assert rounded is model.multiplied(TF32)
    assert (rounded.network, rounded.products, model.products) == (model.network, TF32, FLOAT32)
    assert rounded.kept["rendered"] is model.kept["rendered"]
    assert rounded.kept is not model.kept


def test_tf32_is_allowed_within_the_context_only():
    rounded, before = tiny().multiplied(TF32), torch.get_float32_matmul_precision()
    with products.multiplying(rounded):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "said"),
    [
        (TF32, CPU, torch.float32, "`eval_products` tf32: expected an NVIDIA GPU of compute capability 8.0 or more"),
        (BFLOAT16, CPU, torch.float32, "bfloat16: expected a CPU with AVX-512 BF16 or AMX, and this processor"),
        (BFLOAT16, GPU, torch.float32, "bfloat16: expected a CPU with AVX-512 BF16 or AMX, and this GPU"),
        (BFLOAT16, CPU, torch.bfloat16, "expected float32 weights, and these are torch.bfloat16: leave it out"),
    ],
)
def test_a_device_without_such_products_is_refused(asked, device, dtype, said, monkeypatch):
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match=said):
        require_products(asked, device, dtype)
    require_products(FLOAT32, device, dtype)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_takes_a_gpu_that_has_it(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if has:
        require_products(TF32, GPU, torch.float32)
    else:
        with pytest.raises(UserError, match="this GPU is none"):
            require_products(TF32, GPU, torch.float32)
