import pytest
import torch
from families import D_MODEL, every_family, tiny

from melbo_ray.engines import PackedLinear, Recorded, pack


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_map_is_the_linear_map_and_so_is_its_gradient(bias):
    linear = torch.nn.Linear(48, 80, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear, rows=20)
    x = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (linear, packed):
        free = x.clone().requires_grad_()
        output = module(free)
        results.append((output.detach(), *torch.autograd.grad(output.pow(2).sum(), free)))
    for ours, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@every_family
def test_packing_leaves_the_models_own_layer_alone_and_shares_all_but_the_linear_maps(family):
    layer = tiny(family).layers[1]
    before = {name: id(module) for name, module in layer.named_modules()}
    packed = pack(layer, rows=20)
    assert {name: id(module) for name, module in layer.named_modules()} == before
    linears = [name for name, module in layer.named_modules() if type(module) is torch.nn.Linear]
    assert [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)] == linears
    theirs = dict(layer.named_parameters())
    for name, parameter in packed.named_parameters():
        assert parameter is theirs[name]


def test_where_weights_cannot_be_packed_a_warning_says_so_and_the_layer_is_as_it_was(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(PackedLinear, "__init__", refuse)
    layer = tiny().layers[1]
    with pytest.warns(UserWarning, match="not packed, which costs time only: no such instruction$"):
        assert pack(layer, rows=20) is layer


def test_without_cuda_a_recorded_function_is_the_function():
    calls = []

    def function(x, *, power):
        calls.append(power)
        return (x**power,)

    (cube,) = Recorded(function)(torch.full((D_MODEL,), 2.0), power=3)
    assert calls == [3]
    assert torch.equal(cube, torch.full((D_MODEL,), 8.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_function_follows_its_inputs_shapes_and_options():
    recorded = Recorded(lambda x, *, power: (x**power,))
    for size, power in [(3, 2), (3, 3), (5, 2), (3, 2)]:
        x = torch.randn(size, device="cuda")
        assert torch.equal(recorded(x, power=power)[0], x**power)
