"""The base `promotion`: gradient ascent on the log-probability of the concept's continuations."""

import pytest
import torch

from melbo_ray.config import Config
from melbo_ray.model.steering import Prompts, continuation_score, encode
from melbo_ray.search.base_vectors import base_vector
from melbo_ray.search.promotion import gradient_of, promote
from tests.families import directions, every_family, plain_logits, tiny
from tests.search.test_base_vectors import CALIBRATED, CONCEPT, OPTIONS, a_slice


def log_probability(model, theta):
    """Of the continuations' tokens after the prompt, the mean: transformers, and a hook of the tests' own."""
    prompt, each = model.tokenize(CONCEPT.prompt), []
    for text in CONCEPT.continuations:
        branch = encode(model, text)
        logits = plain_logits(model, torch.cat([prompt, branch]), 1, theta)[len(prompt) - 1 : -1]
        each.append(logits.double().log_softmax(-1)[range(len(branch)), branch])
    return torch.cat(each).mean()


@every_family
def test_the_gradient_is_that_of_transformers_log_probabilities(family):
    """Compared along random directions, by central differences."""
    model, theta = tiny(family), directions(1)[0]
    forced = [[encode(model, text) for text in CONCEPT.continuations]]
    value, gradient = gradient_of(Prompts(model, [model.tokenize(CONCEPT.prompt)], 1, forced), theta)
    assert value == pytest.approx(float(log_probability(model, theta)), abs=1e-4)
    for direction in 0.01 * torch.nn.functional.normalize(directions(4), dim=-1):
        difference = log_probability(model, theta + direction) - log_probability(model, theta - direction)
        assert 2 * float(gradient @ direction) == pytest.approx(float(difference), abs=1e-4, rel=0.05)


def test_the_ascent_keeps_the_norm_and_promotes_more_than_the_gradient_at_0_and_random_directions():
    model, norms = tiny(), [2.0, 4.0]
    tokens = model.tokenize(CONCEPT.prompt)
    thetas = torch.cat([*promote(model, tokens, CONCEPT, 1, norms)])
    torch.testing.assert_close(thetas.norm(dim=-1), torch.tensor(norms))
    again = torch.cat([*promote(model, tokens, CONCEPT, 1, norms)])
    assert torch.equal(thetas, again)
    forced = [[encode(model, text) for text in CONCEPT.continuations]]
    steepest = gradient_of(Prompts(model, [tokens], 1, forced), torch.zeros(model.d_model))[1]
    others = torch.cat([steepest[None], directions(20)])
    others = 4 * torch.nn.functional.normalize(others, dim=-1)
    scores = continuation_score(model, tokens, CONCEPT.continuations, 1, torch.cat([thetas, others]))
    assert scores[1] > scores[0] > 0
    assert scores[1] > scores[2:].max()


def test_a_base_is_promoted_at_rising_norms_from_a_calibrated_radius_on_and_at_a_given_one():
    """Nothing that a tiny random model writes shows the concept, so all norms are tried."""
    found = base_vector(a_slice(), CONCEPT, Config(base="promotion", **CALIBRATED))
    assert found.calibration is not None
    norms = [candidate.radius / found.calibration.radius for candidate in found.candidates]
    assert norms == pytest.approx([1, 2**0.5, 2, 2**1.5, 4, 2**2.5, 8], rel=1e-5)
    (only,) = base_vector(a_slice(), CONCEPT, Config(base="promotion", **OPTIONS)).candidates
    assert only.radius == pytest.approx(OPTIONS["radius"])
