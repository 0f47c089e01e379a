import dataclasses

import pytest
import torch

from melbo_ray.evals.catalog import evenly
from melbo_ray.evals.context import Chain
from melbo_ray.evals.control import more_directions, random_directions
from melbo_ray.evals.runner import evaluate
from melbo_ray.search.subspace import beside, max_abs_cos
from tests.families import directions


def test_a_random_direction_has_the_norm_and_the_complement_of_its_vector(study, chain):
    drawn = random_directions(study, Chain(study.base, chain), chain.index)
    assert drawn.norms == pytest.approx(chain.norms, rel=1e-5)
    for place in range(len(chain)):
        avoided = torch.cat([study.base[None], chain.theta[:place]])
        cosines = torch.nn.functional.cosine_similarity(avoided, drawn.theta[place][None])
        assert float(cosines.abs().max()) < 1e-6
    later = torch.nn.functional.cosine_similarity(chain.theta[1:], drawn.theta[0][None])
    assert float(later.abs().max()) > 0.01


def test_a_random_direction_avoids_what_the_chain_avoids(study, chain):
    avoided = beside(study.base, directions(3, seed=9))
    drawn = random_directions(study, Chain(study.base, chain, avoided=[*avoided]), [1, 5])
    assert float((avoided.double() @ drawn.theta.double().T).abs().max()) < 1e-5
    more = more_directions(dataclasses.replace(study, avoided=[*avoided]), [1, 5])
    assert float((torch.stack([study.base, *avoided]) @ more.theta.T).abs().max()) < 1e-5


def test_a_random_direction_is_drawn_by_its_seed_alone(study, chain):
    whole = Chain(study.base, chain)
    first, again = random_directions(study, whole, chain.index), random_directions(study, whole, [3, 4])
    shorter = random_directions(study, Chain(study.base, chain.take([0, 1, 2, 3])), [3, 4])
    for part in (again, shorter):
        torch.testing.assert_close(first.theta[2:4], part.theta, rtol=0, atol=1e-6)
    assert max_abs_cos(first.theta) < 0.9


def test_it_is_a_null_of_every_evaluation_and_never_of_kind_chain(study, chain):
    for table in evaluate("control", study, chain).values():
        assert set(table["kind"].to_pylist()) <= {"random", "contrast"}
    written = evaluate("control", study, chain)
    assert set(written["kl"]["index"].to_pylist()) == {0, *chain.index}
    assert all(written[name].num_rows for name in ("kl", "generalization", "generations", "dose", "presence"))


def test_presence_has_200_random_directions_at_least(study, chain):
    rows = evaluate("control", study, chain)["presence"]
    assert set(rows_of_random(rows)) == set(range(1, 201))
    more = more_directions(study, range(6, 9))
    assert more.norms == pytest.approx([study.config.radius] * 3)
    assert float(torch.cosine_similarity(more.theta, study.base[None]).abs().max()) < 1e-6
    assert 1e-3 < max_abs_cos(more.theta) < 0.9
    assert torch.equal(more.theta[1:], more_directions(study, [7, 8]).theta)


def rows_of_random(table):
    return [row["index"] for row in table.to_pylist() if row["kind"] == "random"]


def test_evenly_takes_the_first_and_the_last():
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(32, 8)[0] == 0
    assert evenly(32, 8)[-1] == 31
    assert len(set(evenly(1558, 8))) == 8
