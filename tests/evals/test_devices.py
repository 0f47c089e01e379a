"""On a model spread over several devices the base and every evaluation are what they are on one."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.evals.context import Study
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.base_vectors import base_vector
from tests.families import tiny
from tests.pretended import pretending, spread


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_measures_the_same(study, chain, name):
    expected = evaluate(name, study, chain)
    with pretending():
        found = evaluate(name, Study(spread(tiny()), study.config, study.concept, "run", study.base), chain)
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        # How many steps a solver takes hangs on last bits; where it comes to does not.
        for column in set(rows.column_names) - {"evaluations", "stop_reason", "max_abs_cos"}:
            mine, theirs = found[table][column], rows[column]
            if pa.types.is_floating(theirs.type):
                np.testing.assert_allclose(mine.to_numpy(), theirs.to_numpy(), rtol=1e-2, atol=1e-3, err_msg=column)
            elif not pa.types.is_list(theirs.type):
                assert mine.to_pylist() == theirs.to_pylist(), column


def test_the_base_is_the_same(concept, config):
    def found_on(model):
        return base_vector(
            Slice(model, [model.tokenize(concept.prompt)], config.source_layer, config.target_layer), concept, config
        )

    expected = found_on(tiny())
    with pretending():
        found = found_on(spread(tiny()))
    torch.testing.assert_close(found.theta, expected.theta, rtol=1e-2, atol=1e-2)
    assert [c.written.text for c in found.candidates] == [c.written.text for c in expected.candidates]
