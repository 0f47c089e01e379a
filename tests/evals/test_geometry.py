import dataclasses

import numpy as np
import pytest
import torch

from melbo_ray.evals import geometry
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.geometry import change_point
from melbo_ray.evals.presence import contrast
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.families import D_MODEL, directions


def cos(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def summary_of(study, chain):
    return {row["figure"]: row["value"] for row in evaluate("geometry", study, chain)["summary"].to_pylist()}


def test_cosines_are_those_of_numpy(study, chain):
    unembedding = study.model.network.lm_head.weight.numpy()
    for row in evaluate("geometry", study, chain)["geometry"].to_pylist():
        theta = chain.theta[row["index"] - 1].numpy()
        every = np.array([cos(theta, token) for token in unembedding])
        expected = {
            "norm": np.linalg.norm(theta),
            "cos_base": cos(theta, study.base),
            "cos_contrast": cos(theta, contrast(study)),
            "max_abs_cos_unembedding": np.abs(every).max(),
            "bessel_bound": 1 / np.sqrt(row["index"]),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert row["nearest_token"] == study.model.tokenizer.decode([int(np.abs(every).argmax())])


def test_no_direction_exceeds_bessels_bound_with_orthogonal_vectors():
    axes = torch.linalg.qr(directions(20).T).Q.T.double().numpy()
    for direction in directions(100, seed=5).double().numpy():
        assert np.sqrt(np.mean([cos(axis, direction) ** 2 for axis in axes])) <= 1 / np.sqrt(20) + 1e-6


def test_the_figures_of_the_chain(study, chain):
    figures = summary_of(study, chain)
    kls = np.array([reference.divergences(study, theta)["kl_from_base"] for theta in chain.theta])
    whole = reference.divergences(study, torch.zeros(D_MODEL))["kl_from_base"]
    assert figures["unsteered_kl"] == pytest.approx(whole, abs=1e-4)
    for share in (0.1, 0.25, 0.5, 0.75):
        assert figures[f"vectors_below_{share:g}_unsteered_kl"] == (kls < share * whole).sum()
    everything = np.stack([study.base.numpy(), *chain.theta.numpy()])
    gram = [abs(cos(a, b)) for i, a in enumerate(everything) for b in everything[:i]]
    assert figures["max_abs_cos"] == pytest.approx(max(gram), abs=1e-6)
    assert figures["bessel_rms_component"] == pytest.approx(4 / np.sqrt(5), rel=1e-5)


def test_no_direction_has_a_larger_rms_component_than_the_bound(study, chain):
    """Among directions is the one along the longest vector of a chain with one long vector, which reaches it."""
    norms = torch.tensor([10.0, 1, 1, 1, 1])
    uneven = Vectors("chain", chain.index, torch.nn.functional.normalize(chain.theta, dim=-1) * norms[:, None])
    bound = summary_of(study, uneven)["bessel_rms_component"]
    tried = torch.cat([directions(100, norm=1.0, seed=5), uneven.theta / norms[:, None]])
    components = (uneven.theta.double() @ tried.double().T).square().mean(0).sqrt()
    assert float(components.max()) <= bound * (1 + 1e-6)
    assert float(components.max()) > 0.99 * bound


def test_along_the_base_itself_half_of_its_score_is_reached_by_its_own_norm(study, chain, monkeypatch):
    base = study.base if reference.concept_score(study, study.base) > 0 else -study.base
    study = dataclasses.replace(study, base=base)
    monkeypatch.setattr(geometry, "contrast", lambda _: base)
    goal = reference.concept_score(study, base) / 2
    scores = {dose: reference.concept_score(study, base / 5 * dose) for dose in np.linspace(0, 10, 17)[1:]}
    first = next(dose for dose, score in scores.items() if score >= goal)
    assert first <= 5
    assert summary_of(study, chain)["contrast_norm_for_half_score"] == pytest.approx(first)


def test_the_smallest_dose_of_the_mean_difference_direction(study, chain):
    figures, direction = summary_of(study, chain), contrast(study)
    unit, doses = direction / direction.norm(), np.linspace(0, 10, 17)[1:]
    half = reference.divergences(study, torch.zeros(D_MODEL))["kl_from_base"] / 2
    reached = [dose for dose in doses if reference.divergences(study, unit * dose)["kl_from_base"] <= half]
    assert figures["contrast_norm_for_half_kl"] == pytest.approx(reached[0] if reached else None)
    goal = reference.concept_score(study, study.base) / 2
    reached = [dose for dose in doses if goal > 0 and reference.concept_score(study, unit * dose) >= goal]
    assert figures["contrast_norm_for_half_score"] == pytest.approx(reached[0] if reached else None)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_the_change_point_is_where_the_level_changes(cut):
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    assert change_point([*(noise[:cut] + 0.2), *(noise[cut:] + 2)]) == cut
    assert change_point([1.0, 2.0, 3.0]) is None


def test_a_chain_too_short_to_change_says_so(study, chain):
    assert summary_of(study, Vectors("chain", [1], chain.theta[:1]))["change_point"] is None
