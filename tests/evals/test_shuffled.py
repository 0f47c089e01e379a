import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals.context import Chain
from melbo_ray.evals.runner import evaluate, evaluate_share
from melbo_ray.evals.shuffled import random_target, shuffled_chain
from melbo_ray.model.residual_slice import Slice
from melbo_ray.runs import schema
from melbo_ray.search.chain import chain as base_chain
from melbo_ray.search.subspace import Subspace, beside
from tests.evals import reference
from tests.evals.reference import rows_of
from tests.families import D_MODEL, directions


def a_slice(study):
    return Slice(study.model, [study.tokens("training")], 1, 3)


def plain_z(study, theta):
    """Z over all positions but the first, from transformers and two hooks, float64."""
    found, layers = [], study.model.layers
    adder = layers[1].register_forward_hook(lambda _m, _a, out: out + theta)
    reader = layers[3].register_forward_hook(lambda _m, _a, out: found.append(out[0]))
    with torch.no_grad():
        study.model.network(reference.prompt_tokens(study)[None])
    adder.remove()
    reader.remove()
    return found[0].double().numpy()[1:].mean(0)


def avoiding(*vectors):
    taken = Subspace(D_MODEL, D_MODEL)
    for vector in vectors:
        taken.add(vector)
    return taken


def with_options(study, **options):
    return dataclasses.replace(study, config=study.config.model_copy(update=options))


def test_a_target_moves_z_as_far_as_the_base_does_in_a_direction_of_its_own(study, chain):
    target = random_target(study, a_slice(study), avoiding(study.base, chain.theta[0]), seed=3)
    unsteered, base, there = (plain_z(study, theta) for theta in (0 * study.base, study.base, target.theta))
    ratio = np.linalg.norm(there - unsteered) / np.linalg.norm(base - unsteered)
    assert ratio == pytest.approx(1, abs=2e-3)
    assert target.displacement == pytest.approx(ratio, abs=1e-4)
    cosine = (there - unsteered) @ (base - unsteered) / np.linalg.norm(there - unsteered)
    assert target.cos_base == pytest.approx(cosine / np.linalg.norm(base - unsteered), abs=1e-4)
    taken = torch.stack([study.base, chain.theta[0]])
    assert float(torch.cosine_similarity(target.theta[None], taken).abs().max()) < 1e-6
    again = random_target(study, a_slice(study), avoiding(study.base, chain.theta[0]), seed=3)
    assert torch.equal(target.theta, again.theta)


def test_no_shorter_target_of_its_direction_moves_z_as_far(study):
    target = random_target(study, a_slice(study), avoiding(study.base), seed=3)
    unsteered, base = plain_z(study, 0 * study.base), plain_z(study, study.base)
    for share in (0.25, 0.5, 0.75, 0.98):
        assert np.linalg.norm(plain_z(study, share * target.theta) - unsteered) < np.linalg.norm(base - unsteered)


def test_a_distance_out_of_reach_gives_the_longest_target_and_tells_how_far_it_gets(study):
    near = dataclasses.replace(study)
    vars(near)["radius"] = 0.01
    target = random_target(near, a_slice(study), avoiding(study.base), seed=3)
    assert float(target.theta.norm()) == pytest.approx(0.64, rel=1e-3)
    unsteered, base, there = (plain_z(study, theta) for theta in (0 * study.base, study.base, target.theta))
    ratio = np.linalg.norm(there - unsteered) / np.linalg.norm(base - unsteered)
    assert target.displacement == pytest.approx(ratio, abs=1e-4)
    assert ratio < 0.5


@pytest.mark.parametrize("block", [1, 2])
def test_its_vectors_come_as_near_to_their_targets_as_the_chains_do_to_the_base(study, block):
    long = with_options(study, max_evaluations=40, num_vectors=4, block=block)
    found = list(shuffled_chain(long, a_slice(study), 4))
    ours = [vector.relative_loss for vector in base_chain(a_slice(study), study.base, long.config)]
    assert np.median([vector.relative_loss for _, vector in found]) < 1.5 * np.median(ours)
    targets = torch.stack([target.theta for target, _ in found])
    assert len(targets.unique(dim=0)) == 4 // block
    assert [vector.index for _, vector in found] == [1, 2, 3, 4]


def test_its_vectors_are_orthogonal_to_the_base_to_their_targets_and_to_each_other(study):
    taken = [study.base]
    for target, vector in shuffled_chain(study, a_slice(study), 4):
        cosines = torch.cosine_similarity(vector.theta[None].double(), torch.stack([*taken, target.theta]).double())
        assert float(cosines.abs().max()) < 1e-6
        taken.append(vector.theta)


def test_its_vectors_avoid_what_the_chain_avoids(study):
    avoided = [*beside(study.base, directions(3, seed=9))]
    for target, vector in shuffled_chain(study, a_slice(study), 2, avoided=avoided):
        thetas = torch.stack([target.theta, vector.theta]).double()
        assert float((torch.stack(avoided).double() @ thetas.T).abs().max()) < 1e-5


def test_its_certificates_can_be_recomputed_from_what_is_stored(study, chain):
    written = evaluate("shuffled", study, chain)
    unsteered = plain_z(study, 0 * study.base)
    targets = {v.index: t for t, v in shuffled_chain(study, a_slice(study), len(chain))}
    for row in written["vectors"].to_pylist():
        theta, z = torch.tensor(row["vector"]), plain_z(study, targets[row["index"]].theta)
        loss = np.linalg.norm(plain_z(study, theta) - z)
        assert row["kind"] == "shuffled"
        assert row["norm"] == pytest.approx(float(theta.norm()), rel=1e-5)
        assert row["loss"] == pytest.approx(loss, rel=1e-3)
        assert row["relative_loss"] == pytest.approx(loss / np.linalg.norm(z - unsteered), rel=1e-3)
        assert row["max_abs_cos"] < 1e-6
        (kl,) = rows_of(written["kl"], index=row["index"], scale="own")
        expected = reference.divergences(study, theta)
        assert {name: kl[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    figures = {(row["index"], row["figure"]): row["value"] for row in written["summary"].to_pylist()}
    for index, target in targets.items():
        assert figures[index, "target_norm"] == pytest.approx(float(target.theta.norm()))
        assert figures[index, "target_displacement"] == pytest.approx(target.displacement)
        assert figures[index, "target_cos_base"] == pytest.approx(target.cos_base)


@pytest.mark.parametrize("limit", [1.5, "0.3R"])  # R is 5
def test_max_norm_holds_for_it_too(study, chain, limit):
    bounded = with_options(study, max_norm=limit)
    free, held = (evaluate("shuffled", of, chain)["vectors"]["norm"].to_pylist() for of in (study, bounded))
    assert max(free) > 1.6
    assert max(held) <= 1.5 * (1 + 1e-6)


def test_its_rows_are_of_their_own_kind_and_no_more_than_the_chain_has(study, chain):
    written = evaluate("shuffled", study, chain.take([0, 1]))
    for name in ("vectors", "kl", "generalization"):
        assert set(zip(written[name]["kind"].to_pylist(), written[name]["index"].to_pylist(), strict=True)) == {
            ("shuffled", 1), ("shuffled", 2),
        }  # fmt: skip
    again = evaluate("shuffled", study, chain.take([0, 1]))
    assert again["kl"].equals(written["kl"])


@pytest.mark.parametrize("failed", [[2], [1, 2], [3], [1, 4]])
def test_what_failed_of_a_block_is_found_again_as_it_was(study, chain, failed):
    blocks = with_options(study, block=2)
    whole = {row["index"]: row for row in evaluate("shuffled", blocks, chain.take(range(4)))["vectors"].to_pylist()}
    stored = {
        "vectors": schema.table("vectors", [row for index, row in whole.items() if index not in failed]),
        "failures": schema.table(
            "failures",
            [study.row("shuffled", i, evaluation="shuffled", error="", attempts=1) for i in failed],
        ),
    }
    resumed = Chain(study.base, chain.take(range(4)), stored.__getitem__)
    for index in failed:
        (again,) = evaluate_share("shuffled", "shuffled", [index], blocks, resumed)["vectors"].to_pylist()
        assert again == whole[index]


def test_a_chain_that_grows_keeps_the_vectors_of_a_block_that_was_cut_short(study, chain):
    blocks = with_options(study, block=4)
    short = evaluate("shuffled", blocks, chain.take([0, 1]))
    grown = Chain(study.base, chain, lambda name: short.get(name, schema.table(name, [])))
    added = evaluate_share("shuffled", "shuffled", [3, 4], blocks, grown)["vectors"].to_pylist()
    thetas = torch.tensor([row["vector"] for row in [*short["vectors"].to_pylist(), *added]]).double()
    cosines = torch.cosine_similarity(thetas[:, None], thetas[None], dim=-1)
    assert float((cosines - torch.eye(4)).abs().max()) < 1e-6
