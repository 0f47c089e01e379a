"""On a device a host waits once for an evaluation of all, and the batch keeps its shape: devices are pretended."""

import itertools
from typing import Any

import pytest
import torch

from melbo_ray.config import Config
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.chain import Chain, chains
from melbo_ray.search.lockstep import steps
from tests.families import directions, tiny
from tests.pretended import DEVICES, on_one, pretending, waiting

PROMPTS = [torch.arange(40, 60), torch.arange(70, 83), torch.arange(100, 118)]
OPTIONS: dict[str, Any] = {
    "source_layer": 1, "target_layer": 3, "max_evaluations": 12, "max_relative_loss": 1e6, "tolerance": 0.0,
}  # fmt: skip


def sliced(model, count):
    """The slice with the plain step: what records one does not know pretended devices."""
    part: Any = Slice(model, PROMPTS[:count], 1, 3)
    part.value_and_grad = part._value_and_grad
    return part


def begun(part, config):
    found = [Chain(part, row, base, config, str(row)) for row, base in enumerate(directions(part.num_prompts))]
    for chain in found:
        for direction in directions(4, seed=7):
            chain.subspace.add(direction)
    return found


@pytest.mark.parametrize("options", [{}, {"block": 2}, {"solver": "adam"}, {"norm_penalty": 0.1, "max_norm": 2.0}])
@pytest.mark.parametrize("count", [1, 3])
def test_the_host_waits_once_for_an_evaluation_of_all_chains(count, options):
    with pretending():
        part = sliced(on_one(tiny()), count)
        assert str(part.model.device) == DEVICES[0]
        turns = steps({chain: chain.solver() for chain in begun(part, Config(**OPTIONS, **options))})
        # Two evaluations of each: what is laid out once, and a first pair of the solver.
        list(itertools.islice(turns, 2 * count))
        with waiting() as waits:
            list(itertools.islice(turns, 5 * count))
        assert waits == ["tolist"] * 5


def test_a_pretended_device_finds_the_chain_that_the_cpu_finds():
    bases = {str(row): base for row, base in enumerate(directions(2))}
    config = Config(**OPTIONS, num_vectors=2)
    expected = list(chains(sliced(tiny(), 2), bases, config, {}, {}))
    with pretending():
        found = list(chains(sliced(on_one(tiny()), 2), bases, config, {}, {}))
    assert [(name, vector.index) for name, vector in found] == [(name, vector.index) for name, vector in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        assert mine.theta.device.type == "cpu"
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert torch.cosine_similarity(mine.theta, theirs.theta, dim=0) > 0.999


def shapes_of(model, num_vectors):
    """The batch sizes of all steps of chains of which the first ends earlier."""
    part, seen = sliced(model, 3), []

    def step(theta, *inputs, **options):
        seen.append(len(theta))
        return part._value_and_grad(theta, *inputs, **options)

    part.value_and_grad = step
    bases = {str(row): base for row, base in enumerate(directions(3))}
    before = list(chains(sliced(tiny(), 3), bases, Config(**OPTIONS, num_vectors=num_vectors), {}, {}))
    earlier = {"0": [vector for name, vector in before if name == "0"][: num_vectors - 1]}
    list(chains(part, bases, Config(**OPTIONS, num_vectors=num_vectors), earlier, {}))
    return seen


def test_a_batch_keeps_its_rows_on_a_device_when_a_chain_ends_and_loses_them_on_the_cpu(monkeypatch):
    assert set(shapes_of(tiny(), 2)) == {3, 2}
    with pretending():
        assert set(shapes_of(on_one(tiny()), 2)) == {3}


def test_what_a_host_waits_for_is_counted():
    with pretending():
        here = torch.ones(3, device=DEVICES[0])
        with waiting() as waits:
            assert float((here * 2).sum()) == 6
            here + torch.tensor(2.0)
            here.to("cpu")
            torch.ones(3).to(DEVICES[0])
            here[here > 0]
        assert len(waits) == 4
