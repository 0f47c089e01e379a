import math
import re

import numpy as np
import pytest
import torch

from melbo_ray.cli import flags
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.radius import TARGET, calibrate, ordinary
from tests.families import D_MODEL, PROMPT, every_family, plain_hidden_states, tiny


def departure(model, radius, seed, count=16):
    """The ratio by transformers with a hook, in float64 on the block outputs, with a Jacobian by autograd."""
    units = torch.nn.functional.normalize(torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed)))

    def target(theta):
        return plain_hidden_states(model, PROMPT, 1, theta)[0][3][0, 1:].double()

    still, ratios = target(torch.zeros(D_MODEL)), []
    for unit in units:
        linear = (target(1e-2 * unit) - target(-1e-2 * unit)) / 2e-2 * radius
        ratios.append(float((target(radius * unit) - still - linear).square().sum() / linear.square().sum()))
    return np.sqrt(np.mean(ratios))


@every_family
def test_the_curve_is_the_ratio_of_non_linear_to_linear_response(family):
    model = tiny(family)
    found = calibrate(Slice(model, [PROMPT], source=1, target=3), seed=5)
    assert found.radii[0] < found.radius < found.radii[-1]
    at = next(i for i, ratio in enumerate(found.nonlinearity) if ratio > TARGET)
    assert found.nonlinearity[at] == pytest.approx(departure(model, found.radii[at], seed=5), rel=0.05)
    assert departure(model, found.radius, seed=5) == pytest.approx(TARGET, rel=0.2)


def test_the_radius_is_in_units_of_the_residual_stream():
    """A stream k times as large, read by the same normalised blocks, takes vectors k times as long."""
    slice = Slice(tiny(), [PROMPT], source=1, target=3)
    radius = calibrate(slice, seed=0).radius
    assert 0.01 < radius / float(slice.h_source[0, 1:].norm(dim=-1).median()) < 1


def test_positions_where_a_massive_activation_forms_do_not_set_the_radius():
    """One that is turned on by a tenth of the stream's norm would otherwise have a radius of its own."""

    class Forms(Slice):
        def h_target(self, theta, rows=None):
            h = super().h_target(theta, rows).clone()
            h[:, 2] = 50 * self.h_source[0, 2] * (1 - 30 * theta.norm(dim=-1, keepdim=True) / NORM)
            return h

    whole = Slice(tiny(), [PROMPT], source=1, target=3)
    NORM = float(whole.h_source[0, 1:].norm(dim=-1).median())  # noqa: N806
    forms = Forms(tiny(), [PROMPT], source=1, target=3)
    assert ordinary(whole).tolist() == [False] + [True] * (len(PROMPT) - 1)
    assert ordinary(forms).tolist() == [False, True, False] + [True] * (len(PROMPT) - 3)
    assert calibrate(forms, seed=0).radius == pytest.approx(calibrate(whole, seed=0).radius, rel=0.2)


class Linear(Slice):
    def h_target(self, theta, rows=None):
        return (self.h_source + theta[:, None]).expand(len(theta), -1, -1)


class Broken(Slice):
    def h_target(self, theta, rows=None):
        return torch.where(theta[:, None].norm(dim=-1, keepdim=True) > 1e-6, torch.nan, super().h_target(theta))


@pytest.mark.parametrize(("kind", "side"), [(Linear, "below"), (Broken, "above")])
def test_a_slice_without_a_usable_radius_is_one_line(kind, side):
    with pytest.raises(UserError) as said:
        calibrate(kind(tiny(), [PROMPT], source=1, target=3), seed=0)
    assert re.search(f"^no usable radius: .* is {side} .* give --radius$", flags(str(said.value)))


def test_a_norm_at_which_the_model_breaks_is_infinitely_non_linear():
    class BreaksFar(Slice):
        def h_target(self, theta, rows=None):
            h = super().h_target(theta)
            return torch.where(theta[:, None].norm(dim=-1, keepdim=True) > 0.1 * NORM, torch.nan, h)

    whole = Slice(tiny(), [PROMPT], source=1, target=3)
    NORM = float(whole.h_source[0, 1:].norm(dim=-1).median())  # noqa: N806
    found = calibrate(BreaksFar(tiny(), [PROMPT], source=1, target=3), seed=0)
    assert math.isinf(found.nonlinearity[-1])
    assert found.radius <= 0.1 * NORM
