"""A study of a tiny random model, small enough to recompute every figure of it by hand."""

import functools

import pytest
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals.context import Chain, Study, Vectors
from melbo_ray.evals.runner import evaluate
from tests.families import directions, tiny

SOURCE = 1


@pytest.fixture(scope="session")
def concept():
    return Concept(
        name="code",
        prompt="How are you?",
        continuations=["def f():", "import os"],
        words=["def", "import"],
        texts=["def f(x):\n    return x", "import os\nprint(os)"],
        held_out={"river": "Where does the river go?", "short": "Why?"},
        neutral_texts=["The river goes to the sea.", "The dog sleeps all day."],
    )


@pytest.fixture(scope="session")
def config():
    return Config(
        source_layer=SOURCE, target_layer=3, radius=5.0, max_new_tokens=8, held_out_generations=1, samples=2, seed=7
    )


@pytest.fixture(scope="session")
def study(concept, config):
    return Study(tiny(), config, concept, "run", directions(1, norm=5.0, seed=1)[0])


@pytest.fixture(scope="session")
def chain():
    """Five orthogonal vectors with norms 2 … 4."""
    axes = torch.linalg.qr(directions(5, seed=2).T).Q.T
    return Vectors("chain", [1, 2, 3, 4, 5], axes * torch.linspace(4, 2, 5)[:, None])


@pytest.fixture(scope="session")
def whole(study, chain):
    """The chain of a run that has ended and holds every evaluation."""
    return Chain(study.base, chain, functools.cache(lambda table: evaluate(table, study, chain)[table]))
