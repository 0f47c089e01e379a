"""The diagonal preconditioner, against the Jacobian by autograd and numpy."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from melbo_ray.config import Config
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.chain import Chain, chains
from melbo_ray.search.preconditioner import TARGETS, preconditioner
from melbo_ray.seeds import derive_seed
from tests.families import D_MODEL, directions, tiny

PROMPTS = [torch.arange(40, 60), torch.arange(70, 83)]
OPTIONS: dict[str, Any] = {"source_layer": 1, "target_layer": 3, "max_evaluations": 8, "max_relative_loss": 1e6}


def sliced(*prompts):
    return Slice(tiny(), prompts or PROMPTS[:1], source=1, target=3)


@pytest.mark.parametrize("options", [{}, {"norm_penalty": 0.2, "max_norm": 1.0}, {"z_from": 3}])
def test_it_is_the_inverse_fourth_root_of_the_mean_square_of_gradients(options):
    config = Config(**OPTIONS, **options)
    slice = sliced()
    at_0 = lambda theta: slice.z(theta[None], z_from=config.z_from)[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(at_0, torch.zeros(D_MODEL)).double().numpy()
    generator = torch.Generator().manual_seed(derive_seed(0, "", 0, "preconditioner"))
    draws = np.stack([torch.randn(D_MODEL, generator=generator).double().numpy() for _ in range(TARGETS)])
    squares = ((draws / np.linalg.norm(draws, axis=1, keepdims=True)) @ jacobian) ** 2
    mean = squares.mean(0)
    expected = (mean / mean.mean() + 0.01) ** -0.25
    np.testing.assert_allclose(preconditioner(slice, [0], config)[0].numpy(), expected, rtol=2e-3)


def test_a_coordinate_that_the_target_layer_does_not_answer_to_gets_the_largest_factor():
    slice, config = sliced(), Config(**OPTIONS)
    without = torch.ones(D_MODEL)
    without[7] = 0
    plain = slice.value_and_grad
    # The model as it is, but deaf to coordinate 7.
    slice.value_and_grad = lambda theta, *args, **options: tuple(
        part * without if part.ndim == 2 else part for part in plain(theta * without, *args, **options)
    )
    factors = preconditioner(slice, [0], config)[0]
    assert int(factors.argmax()) == 7
    assert float(factors[7]) == pytest.approx(0.01**-0.25)


def test_a_slice_measures_it_once_and_chains_in_lockstep_all_at_once(monkeypatch):
    sizes = []

    def counted(slice, theta, *args):
        sizes.append(len(theta))
        return plain(slice, theta, *args)

    module = importlib.import_module("melbo_ray.search.preconditioner")
    plain = module.value_and_grad
    monkeypatch.setattr(module, "value_and_grad", counted)
    slice, config = sliced(*PROMPTS), Config(**OPTIONS, num_vectors=2)
    bases = {str(row): base for row, base in enumerate(directions(2))}
    list(chains(slice, bases, config, {}, {}))
    list(chains(slice, bases, config, {}, {}))
    Chain(slice, 1, directions(1)[0], config, "another").solver()
    assert sizes == [2] * TARGETS


def test_adam_takes_none():
    slice, config = sliced(), Config(**OPTIONS, num_vectors=1, solver="adam")
    list(chains(slice, {"code": directions(1)[0]}, config, {}, {}))
    assert slice.preconditioners == {}
