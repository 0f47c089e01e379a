"""What the nodes tell of their GPUs' memory, with a Ray that is pretended."""

from types import SimpleNamespace

import pytest
import torch

from melbo_ray.cluster import session

# Ray takes nothing else for the id of a node.
A, B, C = (letter * 56 for letter in "abc")
H100, L4 = {"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 1.0, "accelerator_type:L4": 1.0}


@pytest.fixture
def told(monkeypatch):
    """(resources of the nodes, what each node's probe answers, nodes that are late) → what is found, who was asked."""

    def call(nodes, answers, late=()):
        asked = []

        def options(scheduling_strategy):
            node = scheduling_strategy.node_id
            return SimpleNamespace(remote=lambda: asked.append(node) or node)

        def get(refs):
            found = [answers[ref] for ref in refs]
            for error in (each for each in found if isinstance(each, Exception)):
                raise error
            return found

        ray = session.ray
        listed = [{"Alive": True, "NodeID": name, "Resources": own} for name, own in nodes.items()]
        monkeypatch.setattr(ray, "nodes", lambda: listed)
        monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
        monkeypatch.setattr(ray, "wait", lambda refs, **_: ([ref for ref in refs if ref not in late], [*late]))
        monkeypatch.setattr(ray, "get", get)
        return session.gpu_memory(), asked

    return call


def test_one_node_of_each_type_is_asked_and_the_smallest_counts(told):
    nodes = {"head": {"CPU": 4.0}, A: H100, B: H100, C: L4}
    assert told(nodes, {B: 80e9, C: 24e9}) == (24e9, [B, C])


def test_nothing_is_known_without_gpus_or_answers(told):
    assert told({"head": {"CPU": 4.0}}, {}) == (None, [])
    assert told({A: H100, C: L4}, {A: 80e9}, late=[C])[0] is None
    assert told({C: L4}, {C: ValueError("min() of nothing")})[0] is None


def test_a_node_tells_of_its_smallest_gpu(monkeypatch):
    sizes = [SimpleNamespace(total_memory=size) for size in (48 << 30, 24 << 30)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    assert session._least_gpu_memory() == 24 << 30
