"""Singular vectors of the slice's Jacobian, against the full Jacobian by autograd and its SVD in float64."""

import copy

import pytest
import torch

from melbo_ray.errors import UserError
from melbo_ray.host import progress
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search import power as module
from melbo_ray.search.power import power
from melbo_ray.search.stages import finish
from tests.families import D_MODEL, tiny

PROMPT = "a prompt of bytes"


def leading(slice, count, first=0, **options):
    return finish(power(slice, count, first, **options))


def full_jacobian(family, first):
    """∂ h_target / ∂ θ at 0, (positions × d_model, d_model), float64, from transformers and hooks of the test's own."""
    network, tokens = copy.deepcopy(tiny(family).network).double(), tiny(family).tokenize(PROMPT)
    layers = LanguageModel.wrap(network, tiny(family).tokenizer).layers
    network.config._attn_implementation = "eager"

    def h_target(theta):
        seen = []

        def added(output):
            return (output[0] + theta, *output[1:]) if isinstance(output, tuple) else output + theta

        handles = [
            layers[1].register_forward_hook(lambda _m, _a, out: added(out)),
            layers[3].register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)),
        ]
        network(tokens[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return seen[0][0, first:].flatten()

    return torch.autograd.functional.jacobian(h_target, torch.zeros(D_MODEL, dtype=torch.float64))


@pytest.mark.parametrize(("family", "first"), [("llama", 1), ("gpt2", 0)])
def test_they_are_the_leading_right_singular_vectors(family, first):
    slice = Slice(tiny(family), [tiny(family).tokenize(PROMPT)], source=1, target=3)
    found, values = leading(slice, 4, first)
    _, expected, right = torch.linalg.svd(full_jacobian(family, first), full_matrices=False)
    torch.testing.assert_close(values.double(), expected[:4], rtol=3e-3, atol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-4, rtol=0)
    for vector, other in zip(found.double(), right[:4], strict=True):
        assert abs(float(vector @ other)) == pytest.approx(1, abs=5e-3)


def test_passes_of_any_size_and_the_seed_change_nothing_but_rounding(monkeypatch):
    slice = Slice(tiny(), [tiny().tokenize(PROMPT)], source=1, target=3)
    one, values = leading(slice, 2, 1)
    monkeypatch.setattr("melbo_ray.model.residual_slice.GRADIENT_TOKENS", 1)
    again, other = leading(slice, 2, 1, seed=5)
    torch.testing.assert_close(values, other, rtol=3e-3, atol=0)
    torch.testing.assert_close((one * again).sum(-1).abs(), torch.ones(2), atol=5e-3, rtol=0)


def test_what_it_cannot_do_is_refused_in_a_line():
    slice = Slice(tiny(), [tiny().tokenize(PROMPT)], source=1, target=3)
    with pytest.raises(UserError, match="d_model 32"):
        leading(slice, 33)
    with pytest.raises(UserError, match="only 17 tokens"):
        leading(slice, 2, 17)
    half = LanguageModel.wrap(copy.deepcopy(tiny().network).bfloat16(), tiny().tokenizer)
    with pytest.raises(UserError, match="float32"):
        leading(Slice(half, [half.tokenize(PROMPT)], source=1, target=3), 2)


def test_a_long_search_is_seen_to_be_at_work(monkeypatch):
    slice, before = Slice(tiny(), [tiny().tokenize(PROMPT)], source=1, target=3), progress.passes
    monkeypatch.setattr(module, "_MOST_ITERATIONS", 2)
    leading(slice, 2)
    assert progress.passes - before >= 2
