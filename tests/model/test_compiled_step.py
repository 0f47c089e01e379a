from typing import Any

import pytest
import torch

from melbo_ray.model.compiled_step import Recorded
from melbo_ray.model.kv_cache import Batch, Generation, Request
from melbo_ray.model.residual_slice import Slice
from tests.families import directions, every_family, tiny
from tests.pretended import on_one, pretending, waiting


def step_of(slice, compiled=False):
    return Recorded(slice._value_and_grad, compiled)


@pytest.mark.filterwarnings("error:.*costs time only")
@every_family
def test_a_recorded_step_is_the_step_but_for_the_last_bits(family):
    slice = Slice(tiny(family), [torch.arange(40, 60), torch.arange(70, 83)], source=1, target=3)
    step, z = step_of(slice), directions(2, seed=9)
    for seed in range(4):
        inputs = directions(2, norm=2.0 + seed, seed=seed), z, torch.tensor([0, 1] if seed % 2 else [1, 0])
        options: dict[str, Any] = {"norm_penalty": 0.1, "max_norm": 3.0}
        recorded, plain = step(*inputs, **options), slice._value_and_grad(*inputs, **options)
        for ours, theirs in zip(recorded, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(step._recordings) == 1


def test_a_compiled_step_is_the_step_but_for_the_last_bits(recwarn):
    slice = Slice(tiny("qwen2"), [torch.arange(40, 60)], source=1, target=2)
    inputs = directions(1, seed=1), directions(1, seed=9), torch.tensor([0])
    compiled, plain = step_of(slice, compiled=True)(*inputs), slice._value_and_grad(*inputs)
    assert not [str(warning.message) for warning in recwarn if "not compiled" in str(warning.message)]
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_function_is_recorded_once_for_each_choice_of_shapes_and_options():
    calls = []

    def function(x, *, power):
        calls.append((len(x), power))
        return (x**power,)

    recorded = Recorded(function)
    for size, power in [(4, 2), (4, 3), (5, 2)] * 3:
        x = torch.arange(float(size))
        assert torch.equal(recorded(x, power=power)[0], x**power)
    # Once to record it, and once to see that the recording does the same on other values.
    assert sorted(calls) == sorted([(4, 2), (4, 3), (5, 2)] * 2)


def test_where_a_step_cannot_be_recorded_a_warning_says_so_and_it_is_called():
    def looks_at_values(x):
        return (x * float(x.sum()),)

    recorded = Recorded(looks_at_values, compiled=True)
    with pytest.warns(UserWarning, match="steps are not recorded, which costs time only: "):
        assert torch.equal(recorded(torch.ones(2))[0], torch.full((2,), 2.0))
    assert torch.equal(recorded(torch.ones(2))[0], torch.full((2,), 2.0))


def test_a_step_that_takes_its_way_by_values_is_not_recorded():
    def routed(x):
        # As mixtures of experts do that count their tokens behind the recording's back.
        return (x * 2 if x.numpy()[0] > 0 else x * 3,)

    recorded = Recorded(routed)
    with pytest.warns(UserWarning, match="not recorded, which costs time only: it would do something else"):
        assert recorded(torch.tensor([1.0, 2.0]))[0].tolist() == [2.0, 4.0]
    assert recorded(torch.tensor([-1.0, 2.0]))[0].tolist() == [-3.0, 6.0]


def test_where_there_is_no_compiler_a_warning_says_so_and_the_recording_stays(monkeypatch):
    def missing(*_args, **_options):
        raise FileNotFoundError("no g++\nand more")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.warns(UserWarning, match="steps are not compiled, which costs time only: no g\\+\\+$"):
        assert torch.equal(Recorded(lambda x: (x * 2,), compiled=True)(torch.ones(2))[0], torch.full((2,), 2.0))


@every_family
def test_neither_a_step_of_a_chain_nor_of_decoding_waits_for_a_device_so_that_each_can_be_a_cuda_graph(family):
    with pretending():
        model = on_one(tiny(family))
        slice = Slice(model, [torch.arange(40, 60), torch.arange(70, 83)], source=1, target=3)
        batch = Batch(model, 1, slots=2, width=128)
        requests = [Request(torch.arange(40, 60), theta) for theta in directions(2)]
        batch.admit([Generation(i, request, torch.rand(4).double(), 4) for i, request in enumerate(requests)])
        theta, z, numbers = (value.to(model.device) for value in (directions(2), directions(2, seed=9), torch.ones(2)))
        with waiting() as waits:
            slice._value_and_grad(theta, z, numbers.long(), norm_penalty=0.1, max_norm=3.0)
            batch._decode(numbers.long(), 20 * numbers.long(), theta, batch.ablated)
        assert batch.cached
        assert not waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_function_follows_its_inputs_shapes_and_options(compiled):
    recorded = Recorded(lambda x, *, power: (x**power,), compiled)
    for size, power in [(3, 2), (3, 3), (5, 2), (3, 2)]:
        x = torch.randn(size, device="cuda")
        torch.testing.assert_close(recorded(x, power=power)[0], x**power)
