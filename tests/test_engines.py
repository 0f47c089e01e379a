from collections import Counter

import pytest
import torch
from families import directions, every_family, tiny

from melbo_ray.engines import PackedLinear, Recorded, pack
from melbo_ray.residual import Slice


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


@every_family
def test_a_recorded_step_is_the_step_bit_for_bit(family):
    slice = Slice(tiny(family), [torch.arange(40, 60), torch.arange(70, 83)], source=1, target=3)
    step, z = Recorded(slice._value_and_grad, after=2), directions(2, seed=9)
    for seed in range(4):
        inputs = directions(2, norm=2.0 + seed, seed=seed), z, torch.tensor([0, 1] if seed % 2 else [1, 0])
        options = {"norm_penalty": 0.1, "max_norm": 3.0}
        recorded, plain = step(*inputs, **options), slice._value_and_grad(*inputs, **options)
        assert all(map(torch.equal, recorded, plain))
    assert len(step._recordings) == 1


def test_a_function_is_recorded_for_each_choice_of_shapes_and_options_when_it_is_called_often():
    calls = []

    def function(x, *, power):
        calls.append((len(x), power))
        return (x**power,)

    recorded = Recorded(function, after=3)
    for size, power in [(4, 2), (4, 3), (5, 2)] * 6:
        x = torch.arange(float(size))
        assert torch.equal(recorded(x, power=power)[0], x**power)
    # Twice plainly, once while it is recorded, never again.
    assert Counter(calls) == {(4, 2): 3, (4, 3): 3, (5, 2): 3}


def test_where_a_step_cannot_be_recorded_a_warning_says_so_and_it_is_called():
    def looks_at_values(x):
        return (x * float(x.sum()),)

    with pytest.warns(UserWarning, match="steps are not recorded"):
        assert torch.equal(Recorded(looks_at_values, after=1)(torch.ones(2))[0], torch.full((2,), 2.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_function_follows_its_inputs_shapes_and_options():
    recorded = Recorded(lambda x, *, power: (x**power,))
    for size, power in [(3, 2), (3, 3), (5, 2), (3, 2)]:
        x = torch.randn(size, device="cuda")
        assert torch.equal(recorded(x, power=power)[0], x**power)
