"""On a device an evaluation fetches its figures once for a batch of vectors; the device is pretended."""

import pytest

from melbo_ray.evals.context import Study
from melbo_ray.evals.runner import evaluate
from tests.families import tiny
from tests.pretended import on_one, pretending, waiting


def fetches(study, name, vectors):
    """How often figures are fetched once what all vectors share has been computed.

    What is not counted: transformers looks at the positions, once a pass, before anything else has been asked for.
    """
    evaluate(name, study, vectors.take([0]))
    with waiting() as waits:
        evaluate(name, study, vectors)
        return waits.count("tolist")


@pytest.mark.parametrize(("name", "most"), [("kl", 2), ("generalization", 1), ("greedy", 8)])
def test_figures_are_fetched_once_for_all_vectors_and_tokens_once_a_step(study, chain, name, most):
    with pretending():
        there = Study(on_one(tiny()), study.config, study.concept, "run", study.base)
        few, many = (fetches(there, name, chain.take(range(count))) for count in (2, 5))
    assert 0 < few <= many <= most
