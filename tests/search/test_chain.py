import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from melbo_ray.config import ChainOptions, Config
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.chain import BEGIN, Chain, chain, chains
from melbo_ray.search.lockstep import steps
from melbo_ray.search.sink import target_shares
from melbo_ray.search.subspace import Subspace, disentangle, max_abs_cos
from melbo_ray.seeds import derive_seed
from tests.families import D_MODEL, directions, tiny

PROMPT, OTHER = torch.arange(40, 60), torch.arange(70, 83)
EASY: dict[str, Any] = {
    "radius": 3.0,
    "source_layer": 1,
    "target_layer": 3,
    "max_evaluations": 30,
    "max_relative_loss": 1e6,
}


def a_slice(*prompts):
    return Slice(tiny(), prompts or [PROMPT], source=1, target=3)


def finish(generator):
    """The generator's items and its return value."""
    items = []
    while True:
        try:
            items.append(next(generator))
        except StopIteration as end:
            return items, end.value


def plain_z(theta, first=0):
    """z(θ) from `first` on, from transformers, a hook, and a float64 mean."""
    return plain_stream(theta)[first:].mean(0)


def plain_stream(theta):
    """The target layer's output, (seq, d_model) float64."""
    model = tiny()
    handle = model.layers[1].register_forward_hook(lambda _m, _a, out: out + theta)
    captured = []
    reader = model.layers[3].register_forward_hook(lambda _m, _a, out: captured.append(out))
    with torch.no_grad():
        model.network(PROMPT[None])
    handle.remove()
    reader.remove()
    return captured[0][0].double().numpy()


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_a_vectors_certificate_can_be_recomputed_from_the_vector_alone(solver):
    base = directions(1)[0]
    vectors, reason = finish(chain(a_slice(), base, Config(num_vectors=4, solver=solver, z_from=2, **EASY)))
    assert reason == "num_vectors"
    taken = [base.double().numpy()]
    for index, vector in enumerate(vectors, 1):
        theta = vector.theta.double().numpy()
        loss, from_0, from_1 = (np.linalg.norm(plain_z(vector.theta, z) - plain_z(base, z)) for z in (2, 0, 1))
        unsteered = [np.linalg.norm(plain_z(torch.zeros(D_MODEL), z) - plain_z(base, z)) for z in (2, 0, 1)]
        cosines = [abs(theta @ other) / np.linalg.norm(theta) / np.linalg.norm(other) for other in taken]
        assert vector.index == index
        assert vector.norm == pytest.approx(np.linalg.norm(theta), rel=1e-5)
        assert vector.loss == pytest.approx(loss, rel=1e-4)
        assert vector.relative_loss == pytest.approx(loss / unsteered[0], rel=1e-4)
        assert vector.relative_loss_from_0 == pytest.approx(from_0 / unsteered[1], rel=1e-4)
        assert vector.relative_loss_from_1 == pytest.approx(from_1 / unsteered[2], rel=1e-4)
        assert vector.max_abs_cos == pytest.approx(max(cosines), abs=1e-8)
        assert vector.max_abs_cos < 1e-6
        assert vector.seed == derive_seed(0, "code", index, "start")
        taken.append(theta)


def test_the_layers_are_the_slices_and_the_options_those_of_chains():
    narrow = ChainOptions(num_vectors=2, max_evaluations=30, max_relative_loss=1e6)
    ours = list(chain(a_slice(), directions(1)[0], narrow))
    same = list(chain(a_slice(), directions(1)[0], Config(**narrow.model_dump(), source_layer=0, target_layer=1)))
    assert [vector.theta.tolist() for vector in ours] == [vector.theta.tolist() for vector in same]


def test_every_evaluation_is_seen_as_the_loop_makes_it():
    link = Chain(a_slice(), 0, directions(1)[0], Config(num_vectors=2, block=2, **EASY), "code")
    seen = list(steps({link: link.solver()}))
    assert [step.solution is None for step in seen] == [True] * (len(seen) - 1) + [False]
    assert seen[-1].solution is not None
    assert seen[-1].solution.evaluations == len(seen)
    torch.testing.assert_close(seen[0].theta, disentangle(BEGIN * link.start()).float())
    for step in seen:
        expected = [np.linalg.norm(plain_z(theta, 1) - plain_z(link.base, 1)) for theta in step.theta]
        np.testing.assert_allclose(step.losses, expected, rtol=1e-4)
    assert [vector.index for vector in link.add(seen[-1].solution)] == [1, 2]


def test_the_solver_lowers_the_loss_of_its_random_start():
    slice, base = a_slice(), directions(1)[0]
    (vector,) = chain(slice, base, Config(num_vectors=1, **EASY))
    start = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(vector.seed))
    start -= (start @ base) / (base @ base) * base
    before = np.linalg.norm(plain_z(start / start.norm() * 3.0) - plain_z(base))
    assert vector.loss < 0.5 * before


def test_a_chain_of_d_model_minus_1_vectors_is_orthogonal_and_finite():
    base = directions(1)[0]
    options: dict[str, Any] = EASY | {"max_evaluations": 4, "min_norm": 0}
    vectors, reason = finish(chain(a_slice(), base, Config(num_vectors=D_MODEL - 1, **options)))
    assert (len(vectors), reason) == (D_MODEL - 1, "num_vectors")
    assert max_abs_cos(torch.stack([base, *(vector.theta for vector in vectors)])) <= 1e-6
    assert all(np.isfinite(vector.norm) for vector in vectors)


def test_more_rows_of_a_base_are_out_of_bounds_and_the_first_is_the_target():
    base, *others = bases = directions(3, seed=6)
    vectors, _ = finish(chain(a_slice(), bases, Config(num_vectors=2, **EASY)))
    for vector in vectors:
        loss = np.linalg.norm(plain_z(vector.theta, 1) - plain_z(base, 1))
        assert vector.loss == pytest.approx(loss, rel=1e-4)
        cosines = torch.cosine_similarity(vector.theta[None], bases)
        assert float(cosines.abs().max()) < 1e-6
        assert vector.max_abs_cos < 1e-6
    alone = list(chain(a_slice(), base, Config(num_vectors=2, **EASY)))
    assert not torch.equal(alone[0].theta, vectors[0].theta)
    assert float(torch.cosine_similarity(alone[0].theta[None], torch.stack(others)).abs().max()) > 1e-3


def test_an_interrupted_chain_gives_the_same_vectors_bit_for_bit():
    base, config = directions(1)[0], Config(num_vectors=4, **EASY)
    whole = list(chain(a_slice(), base, config))
    resumed = list(chain(a_slice(), base, config, earlier=whole[:2]))
    assert [vector.index for vector in resumed] == [3, 4]
    for one, other in zip(whole[2:], resumed, strict=True):
        assert torch.equal(one.theta, other.theta)


def test_chains_in_lockstep_are_the_chains_alone():
    bases = dict(zip(["code", "alien"], directions(2), strict=True))
    config, stopped = Config(num_vectors=2, **EASY), {}
    together = list(chains(a_slice(PROMPT, OTHER), bases, config, {}, stopped))
    assert stopped == {"code": "num_vectors", "alien": "num_vectors"}
    for concept, prompt in [("code", PROMPT), ("alien", OTHER)]:
        alone = list(chain(a_slice(prompt), bases[concept], config, concept))
        ours = [vector for name, vector in together if name == concept]
        # Another batch rounds otherwise, and a solver's path magnifies that: the first losses agree, not the bits.
        assert ours[0].loss == pytest.approx(alone[0].loss, rel=0.05)
        assert [vector.index for vector in ours] == [1, 2]


def test_a_block_is_mutually_orthogonal_and_each_of_its_vectors_lowers_the_loss():
    base, config = directions(1)[0], Config(num_vectors=5, block=3, **EASY)
    vectors, reason = finish(chain(a_slice(), base, config))
    assert ([vector.index for vector in vectors], reason) == ([1, 2, 3, 4, 5], "num_vectors")
    assert max_abs_cos(torch.stack([base, *(vector.theta for vector in vectors)])) <= 1e-6
    assert len({vector.seed for vector in vectors}) == 5
    assert max(vector.relative_loss for vector in vectors) < 1


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_chain_interrupted_in_the_middle_of_a_block_gives_the_same_vectors_bit_for_bit(killed_after):
    base = directions(1)[0]
    whole = list(chain(a_slice(), base, Config(num_vectors=5, block=3, **EASY)))
    longer = Config(num_vectors=6, block=3, **EASY)
    resumed = list(chain(a_slice(), base, longer, earlier=whole[:killed_after]))
    assert [vector.index for vector in resumed] == list(range(killed_after + 1, 7))
    for one, other in zip(whole[killed_after:], resumed, strict=False):
        assert torch.equal(one.theta, other.theta)


def test_what_is_stored_of_an_interrupted_block_stands_and_the_rest_is_orthogonal_to_it():
    base, config = directions(1)[0], Config(num_vectors=3, block=3, **EASY)
    first, *_ = chain(a_slice(), base, config)
    # As another machine might have written it.
    other = dataclasses.replace(first, theta=first.theta + 0.01 * Subspace(D_MODEL, 1).remove(directions(9)[8]))
    resumed = list(chain(a_slice(), base, config, earlier=[other]))
    assert [vector.index for vector in resumed] == [2, 3]
    assert max(abs(float(torch.cosine_similarity(v.theta, other.theta, dim=0))) for v in resumed) < 1e-6


def test_another_seed_gives_other_vectors():
    first, second = (
        next(chain(a_slice(), directions(1)[0], Config(num_vectors=1, seed=seed, **EASY))) for seed in (0, 1)
    )
    assert not torch.equal(first.theta, second.theta)


@pytest.mark.parametrize("options", [{"min_norm": 1e3}, {"max_relative_loss": 1e-6}])
def test_a_chain_stops_after_the_vector_whose_norm_or_effect_has_vanished(options):
    vectors, reason = finish(chain(a_slice(), directions(1)[0], Config(num_vectors=9, **(EASY | options))))
    assert (len(vectors), reason) == (1, next(iter(options)))
    again, same = finish(chain(a_slice(), directions(1)[0], Config(num_vectors=9, **(EASY | options)), earlier=vectors))
    assert (again, same) == ([], reason)


def test_no_vector_is_longer_than_max_norm():
    long, short = (
        list(chain(a_slice(), directions(1)[0], Config(num_vectors=2, **EASY, **bound)))
        for bound in ({}, {"max_norm": 2.0})
    )
    assert max(vector.norm for vector in long) > 2.0
    assert max(vector.norm for vector in short) <= 2.0 + 1e-5


def test_the_norm_penalty_shortens_vectors_and_is_not_in_the_loss():
    free, penalised = (
        next(chain(a_slice(), directions(1)[0], Config(num_vectors=1, **EASY, norm_penalty=penalty)))
        for penalty in (0, 3)
    )
    assert penalised.norm < free.norm
    z = np.linalg.norm(plain_z(penalised.theta, 1) - plain_z(directions(1)[0], 1))
    assert penalised.loss == pytest.approx(z, rel=1e-4)


def test_more_vectors_than_dimensions_are_refused():
    with pytest.raises(UserError, match=f"d_model - 1 = {D_MODEL - 1}"):
        next(chain(a_slice(), directions(1)[0], Config(num_vectors=D_MODEL, **EASY)))


def test_a_base_that_does_nothing_or_breaks_the_model_is_refused():
    nothing, broken = torch.zeros(D_MODEL), torch.full((D_MODEL,), float("nan"))
    nothing[0] = 1e-30
    with pytest.raises(UserError, match="changes nothing"):
        next(chain(a_slice(), nothing, Config(num_vectors=1, **EASY)))
    with pytest.raises(ValueError, match="finite"):
        next(chain(a_slice(), broken, Config(num_vectors=1, **EASY)))


def test_a_seed_depends_on_all_its_parts():
    parts = [
        (0, "code", 1, "start"),
        (1, "code", 1, "start"),
        (0, "stem", 1, "start"),
        (0, "code", 2, "start"),
        (0, "code", 1, "text"),
    ]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(*parts[0]) == derive_seed(*parts[0])


def test_a_certificate_is_frozen():
    vector = next(chain(a_slice(), directions(1)[0], Config(num_vectors=1, **EASY)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        vector.loss = 0.0  # ty: ignore[invalid-assignment]


def test_the_shares_of_the_target_are_those_of_the_plain_stream():
    base = directions(1)[0]
    change = plain_stream(base) - plain_stream(torch.zeros(D_MODEL))
    first, rest, whole = change[0], change[1:].sum(0), change.sum(0)
    found = target_shares(a_slice(), base)
    assert found["sink_share"] == pytest.approx(first @ first / (first @ first + rest @ rest), rel=1e-4)
    assert found["coordinate_share"] == pytest.approx((whole**2).max() / (whole @ whole), rel=1e-4)


def test_z_cannot_start_behind_the_prompt():
    with pytest.raises(UserError, match=r"position 20, and the prompt has 20"):
        next(chain(a_slice(), directions(1)[0], Config(num_vectors=1, z_from=len(PROMPT), **EASY)))


def test_a_limit_in_multiples_of_r_is_that_multiple_of_the_bases_norm():
    base = directions(1, norm=1.6)[0]
    plain, relative = (
        list(chain(a_slice(), base, Config(num_vectors=2, **EASY, max_norm=limit)))
        for limit in (0.5 * float(base.norm()), "0.5R")
    )
    assert all(torch.equal(a.theta, b.theta) for a, b in zip(plain, relative, strict=True))
    assert max(vector.norm for vector in plain) == pytest.approx(0.8, rel=1e-4)


def test_chains_of_one_batch_have_one_limit():
    bases = {"code": directions(1, norm=3.0)[0], "alien": directions(1, norm=2.0)[0]}
    with pytest.raises(UserError, match="`max_norm` 2R differs between bases"):
        next(chains(a_slice(PROMPT, OTHER), bases, Config(num_vectors=1, **EASY, max_norm="2R"), {}, {}))


def test_directions_beside_the_base_leave_fewer_vectors():
    rows = torch.eye(D_MODEL)[:21]
    with pytest.raises(UserError, match=r"12 vectors .* and to 20 directions more: expected at most d_model - 21 = 11"):
        next(chain(a_slice(), rows, Config(num_vectors=12, **EASY)))
