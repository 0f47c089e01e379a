import dataclasses

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from melbo_ray.model import packed_linear
from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.packed_linear import opaque, pack
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import generate
from tests.families import directions, every_family, tiny

X, Y = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
V, W = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)) / 8
BIAS = torch.arange(6.0)
linear = torch.nn.functional.linear


def count(module, name):
    return sum(name in str(node.target) for node in module.graph.nodes)


def packed(function, *inputs):
    """The packed recording, which does what the function does on other inputs than those it was recorded with."""
    module = pack(make_fx(function)(*inputs))
    others = [value.flip(0) + 1 for value in inputs]
    for ours, plain in zip(module(*others), function(*others), strict=True):
        torch.testing.assert_close(ours, plain)
    assert not count(module, "mm")
    return count(module, "linear_pointwise")


def test_products_of_one_input_become_one():
    assert packed(lambda x: (linear(x, V), linear(x, W)), X) == 1
    assert packed(lambda x: (linear(x, V, BIAS), linear(x, W, BIAS)), X) == 1
    assert packed(lambda x: (linear(x, V, BIAS), linear(x, W)), X) == 2
    assert packed(lambda x, y: (linear(x, V), linear(y, W)), X, Y) == 2


def test_sums_of_products_become_one():
    assert packed(lambda x, y: (linear(x, V) + linear(y, W),), X, Y) == 1
    assert packed(lambda x, y: (linear(x, V) + linear(y, W) + linear(x * y, W),), X, Y) == 1
    assert packed(lambda x, y: (linear(x, V, BIAS) + linear(y, W),), X, Y) == 2


def test_a_product_added_to_itself_stays():
    def doubled(x):
        product = linear(x, V)
        return (product + product,)

    assert packed(doubled, X) == 1


def test_where_torch_has_no_onednn_a_warning_says_so(monkeypatch):
    monkeypatch.setattr("melbo_ray.model.packed_linear._packed", None)
    with pytest.warns(UserWarning, match="not packed, which costs time only: this torch is built without oneDNN"):
        torch.testing.assert_close(Recorded(lambda x: (linear(x, V),))(X)[0], linear(X, V))


def test_packed_weights_go_with_what_was_recorded():
    recorded = Recorded(lambda x: (linear(x, V),))
    recorded(X)
    (module,) = recorded._recordings.values()
    assert dict(module.named_buffers())  # ty: ignore[missing-attribute]
    del recorded
    assert not dict(module.named_buffers())  # ty: ignore[missing-attribute]


def test_a_product_that_is_used_otherwise_too_stays_by_itself():
    def function(x, y):
        first = linear(x, V)
        return first + linear(y, W), first.exp()

    assert packed(function, X, Y) == 2


def test_sums_that_broadcast_or_scale_stay():
    assert packed(lambda x, y: (linear(x, V) + linear(y[:1], W),), X, Y) == 2
    assert packed(lambda x, y: (torch.add(linear(x, V), linear(y, W), alpha=2),), X, Y) == 2


def test_products_of_what_is_not_constant_stay():
    module = pack(make_fx(lambda x: (x[0] @ x[1].T,))(X))
    assert count(module, "mm") == 1
    torch.testing.assert_close(module(Y)[0], Y[0] @ Y[1].T)


@every_family
def test_a_step_has_a_product_for_each_input_and_weights_are_not_touched(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    slice = Slice(model, [torch.arange(40, 60)], source=1, target=2)
    step = Recorded(slice._value_and_grad)
    step(directions(1), directions(1, seed=1), torch.tensor([0]))
    (module,) = step._recordings.values()
    # Attention's input and output, the MLP's input and output, each forward and backward; one layer. Where attention
    # and MLP stand side by side, the gradient of both outputs is one.
    assert count(module, "linear_pointwise") == (7 if family == "gpt_neox" else 8)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_packed_products_are_hidden_from_the_compiler():
    module = pack(make_fx(lambda x: (linear(x, V, BIAS),))(X))
    hidden = opaque(module)
    assert (count(hidden, "linear_pointwise"), count(hidden, "melbo_ray.product")) == (0, 1)
    assert count(module, "linear_pointwise") == 1
    assert torch.equal(hidden(Y)[0], module(Y)[0])


def test_weights_too_many_for_a_copy_are_not_packed(monkeypatch):
    monkeypatch.setattr("melbo_ray.model.compiled_step.MOST_PACKED", V.nbytes - 1)
    with pytest.warns(UserWarning, match="not packed, which costs time only: packed copies would take"):
        torch.testing.assert_close(Recorded(lambda x: (linear(x, V),))(X)[0], linear(X, V))


def test_where_weights_cannot_be_packed_a_warning_says_so_and_the_recording_stays(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr("melbo_ray.model.compiled_step.pack", refuse)
    with pytest.warns(UserWarning, match="not packed, which costs time only: no such instruction$"):
        torch.testing.assert_close(Recorded(lambda x: (linear(x, V),))(X)[0], linear(X, V))


def test_whether_weights_are_packed_can_be_said(monkeypatch, recwarn):
    monkeypatch.setattr("melbo_ray.model.compiled_step.MOST_PACKED", V.nbytes - 1)
    for told in (True, False):
        recorded = Recorded(lambda x: (linear(x, V),), packed=told)
        torch.testing.assert_close(recorded(X)[0], linear(X, V))
        (module,) = recorded._recordings.values()
        assert bool(count(module, "linear_pointwise")) is told
    assert not recwarn


@pytest.mark.parametrize("told", [True, False])
def test_a_model_says_whether_its_slice_and_its_texts_are_packed(told):
    model = dataclasses.replace(tiny(), packed=told)
    slice = Slice(model, [torch.arange(40, 60)], source=1, target=2)
    slice.value_and_grad(directions(1), directions(1, seed=1), torch.tensor([0]))
    generate(model, [Request(torch.arange(40, 60), directions(1)[0])], 1, max_new_tokens=4)
    for recorded in (slice.value_and_grad, model.kept["batch"].decode):
        (module,) = recorded._recordings.values()
        assert bool(count(module, "linear_pointwise")) is told


@pytest.mark.skipif(packed_linear._packed is None, reason="torch is built without oneDNN")
def test_products_are_onednns_while_it_is_asked_for_and_nothing_is_differentiated(monkeypatch):
    calls, real = [], packed_linear._packed
    monkeypatch.setattr(packed_linear, "_packed", lambda *args: calls.append(len(args[0])) or real(*args))
    linear, x = torch.nn.Linear(6, 5), torch.randn(2, 6, 3).mT
    expected = x @ linear.weight.T + linear.bias
    with packed_linear.onednn():
        torch.testing.assert_close(linear(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), expected)
            torch.testing.assert_close(linear.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
    assert calls == [2]
