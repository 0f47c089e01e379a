import numpy as np
import torch

from melbo_ray.evals import evaluate
from melbo_ray.evals.shuffled import shuffled_chain, shuffled_target
from melbo_ray.residual import Slice
from melbo_ray.subspace import max_abs_cos
from tests.families import directions


def test_a_shuffled_target_is_as_far_away():
    unsteered, reached = directions(2)
    target = shuffled_target(unsteered, reached, seed=3)
    np.testing.assert_allclose(np.sort(target - unsteered), np.sort(reached - unsteered), atol=1e-6)
    assert float((target - reached).norm()) > 0.1
    assert torch.equal(target, shuffled_target(unsteered, reached, seed=3))


def test_the_shuffled_chain_nears_its_target_and_is_orthogonal_to_the_base(study, monkeypatch):
    targets = []

    def keep(*args):
        targets.append(shuffled_target(*args))
        return targets[-1]

    monkeypatch.setattr("melbo_ray.evals.shuffled.shuffled_target", keep)
    thetas = shuffled_chain(study, 3)
    part = Slice(study.model, [study.tokens("training")], 1, 3)
    far, *near = (part.z(torch.stack([torch.zeros(32), *thetas])) - targets[0]).norm(dim=-1).tolist()
    assert max(near) < 0.9 * far
    assert max_abs_cos(torch.cat([study.base[None], thetas])) < 1e-6


def test_its_rows_are_of_their_own_kind_and_no_more_than_the_chain_has(study, chain):
    written = evaluate("shuffled", study, chain.take([0, 1]))
    for name in ("kl", "generalization"):
        assert set(zip(written[name]["kind"].to_pylist(), written[name]["index"].to_pylist(), strict=True)) == {
            ("shuffled", 1), ("shuffled", 2),
        }  # fmt: skip
    again = evaluate("shuffled", study, chain.take([0, 1]))
    assert again["kl"].equals(written["kl"])
