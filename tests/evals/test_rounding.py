"""Evaluations with rounded products: which they are, and what is told of their error."""

import dataclasses

import pytest
import torch

from melbo_ray.evals.rounding import rounding_error
from melbo_ray.evals.runner import evaluate
from melbo_ray.model import products
from melbo_ray.runs import checks
from tests.evals import reference
from tests.model.test_products import multiplies, rounding_by_itself

ROUNDED = ["kl", "generalization", "dose", "generations", "greedy", "rescaled", "composition"]


@pytest.fixture
def rounding(study):
    """The study with bfloat16 products asked for."""
    return dataclasses.replace(study, config=study.config.model_copy(update={"eval_products": "bfloat16"}))


@multiplies
def test_the_error_told_is_that_of_the_kls_of_parts_of_the_base(rounding):
    found = rounding_error(rounding)["products"]
    parts = [part * rounding.base for part in (0.0, 0.5, 0.75, 0.9)]
    by_itself = dataclasses.replace(rounding, model=rounding_by_itself(rounding.model))
    exact, rounded = (
        [reference.divergences(own, part)["kl_from_base"] for part in parts] for own in (rounding, by_itself)
    )
    errors = [abs(one - other) for one, other in zip(exact, rounded, strict=True)]
    assert found["error"] == pytest.approx(max(errors), rel=0.3)
    assert (found["tolerance"], found["compared"]) == (pytest.approx(exact[0], abs=1e-4), 4)
    assert checks.reasons({"evaluator": {"here": {"products": found}}}) == [f"products: {found['reason']}"]
    assert checks.line({"evaluator": {"here": {"products": found}}}).endswith(" nats")


def test_nothing_is_told_of_float32_products(study):
    assert rounding_error(study) == {}
    assert study.rounded is study


@pytest.mark.parametrize("name", [*ROUNDED, "presence"])
def test_logits_and_texts_are_rounded_and_presence_is_not(name, rounding, chain, monkeypatch):
    used = set()
    multiplying = products.multiplying

    def watched(model):
        used.add(model.products)
        return multiplying(model.multiplied("float32"))

    for module in ("steering", "kv_cache"):
        monkeypatch.setattr(f"melbo_ray.model.{module}.multiplying", watched)
    evaluate(name, dataclasses.replace(rounding), chain)
    assert used == {"bfloat16" if name in ROUNDED else "float32"}


@multiplies
def test_kl_is_that_of_layers_that_round_by_themselves(rounding, chain):
    table = evaluate("kl", rounding, chain)["kl"]
    by_itself = dataclasses.replace(rounding, model=rounding_by_itself(rounding.model))
    for index, theta in zip(chain.index, chain.theta, strict=True):
        (row,) = reference.rows_of(table, index=index, scale="own")
        exact, expected = (reference.divergences(own, theta)["kl_from_base"] for own in (rounding, by_itself))
        assert abs(row["kl_from_base"] - expected) < 0.3 * abs(exact - expected) + 1e-4
    assert torch.isfinite(torch.tensor(table["kl_from_base"].to_pylist())).all()
