"""A model spread over several devices gives what it gives on one."""

from typing import Any

import accelerate
import pytest
import torch

from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts, continuation_score
from tests.families import directions, every_family, tiny
from tests.pretended import DEVICES, pretending, spread

SOURCE, TARGET = 1, 2
PROMPTS = ["How are you?", "Hi", "A longer prompt than the others"]


def figures(model):
    """Logits, scores and greedy texts of a model, steered, on the CPU."""
    prompts, thetas = [model.tokenize(text) for text in PROMPTS], directions(5)
    requests = [Request(prompts[i % 3], theta, temperature=0) for i, theta in enumerate(thetas)]
    logits = Prompts(model, prompts, SOURCE).logits(thetas, torch.tensor([0, 1, 2, 2, 0]))
    score = continuation_score(model, prompts[0], ["def f", "x"], SOURCE, thetas)
    texts = generate(model, requests, SOURCE, max_new_tokens=5, slots=3)
    return [row.cpu() for row in logits], score, texts


@every_family
def test_steering_places_everything_on_the_layers_own_device(family):
    expected = figures(tiny(family))
    with pretending():
        model = spread(tiny(family))
        assert {str(next(layer.parameters()).device) for layer in model.layers} == set(DEVICES)
        found = figures(model)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert found[2] == expected[2]


@every_family
def test_a_base_can_be_sought_across_devices(family):
    prompts, thetas = [tiny(family).tokenize(text) for text in PROMPTS], directions(3)

    def sought(model):
        part, theta = Slice(model, prompts, SOURCE, TARGET), thetas.to(model.device).requires_grad_()
        z = part.z(theta)
        return z.detach().cpu(), torch.autograd.grad(z.norm(), theta)[0].cpu()

    expected = sought(tiny(family))
    with pretending():
        found = sought(spread(tiny(family)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pretended_devices_refuse_to_meet():
    with pretending():
        one, other = (torch.ones(2, device=device) for device in DEVICES)
        assert (one + one).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match=r"aten\.add"):
            one + other


def test_layers_that_lie_on_disk_until_they_run_change_nothing(tmp_path):
    plain = tiny()
    plain.network.save_pretrained(tmp_path / "model")
    plain.tokenizer.save_pretrained(tmp_path / "model")
    model = LanguageModel.load(str(tmp_path / "model"), device_map={"": "cpu"})
    device_map: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {f"model.layers.{number}": "disk" if number in (0, 2) else "cpu" for number in range(4)}
    accelerate.dispatch_model(model.network, device_map, main_device="cpu", offload_dir=str(tmp_path / "offload"))  # ty: ignore[invalid-argument-type]
    assert {next(layer.parameters()).device.type for layer in model.layers} == {"cpu", "meta"}
    found, expected = figures(model), figures(plain)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert found[2] == expected[2]
