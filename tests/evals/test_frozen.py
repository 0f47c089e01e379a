"""Frozen attention, independence, efficiency and exponents, against hooks of the test's own and float64 algebra."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melbo_ray.evals import frozen, privileged
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.efficiency import NOISE, RADII, neutral
from melbo_ray.evals.linear import real_losses
from melbo_ray.evals.presence import text_sets
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.architecture import stream, with_stream
from tests.evals import reference
from tests.evals.reference import rows_of
from tests.evals.test_convergence import null_of, streams
from tests.families import D_MODEL, tiny

ZERO = torch.zeros(D_MODEL)


@contextlib.contextmanager
def projections_of_unsteered(study, tokens):
    """Within the context, the query and key projections put out what they put out unsteered."""
    modules = [part for layer in study.model.layers for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    found = {}
    handles = [
        part.register_forward_hook(lambda module, _args, output: found.update({module: output})) for part in modules
    ]
    streams(study, tokens, ZERO)
    for handle in handles:
        handle.remove()
    kept = dict(found)
    handles = [part.register_forward_hook(lambda module, _args, _output: kept[module]) for part in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_frozen_attention_is_that_of_projections_replaced_by_unsteered_ones(study, chain, implementation):
    study = dataclasses.replace(study)
    study.model.network.set_attn_implementation(implementation)
    tokens, layer = reference.prompt_tokens(study), study.config.target_layer
    plain = streams(study, tokens, ZERO)[layer][1:].mean(0)
    rows = evaluate("frozen", study, chain.take([1]))["frozen"]
    study.model.network.set_attn_implementation("sdpa")
    for kind, theta in (("chain", chain.theta[1]), ("random", null_of(study, 2, chain.norms[1]))):
        for name, context in {
            "free": contextlib.nullcontext(),
            "frozen": projections_of_unsteered(study, tokens),
        }.items():
            (row,) = rows_of(rows, kind=kind, attention=name)
            base = streams(study, tokens, study.base)[layer][1:].mean(0) - plain
            targets = [reference.next_token(study, one) for one in (study.base, ZERO)]
            with context:
                moved = streams(study, tokens, theta)[layer][1:].mean(0) - plain
                here = reference.next_token(study, theta)
            expected = {
                "moved": np.linalg.norm(moved),
                "cos": moved @ base / np.linalg.norm(moved) / np.linalg.norm(base),
                "kl_from_base": reference.kl(here, targets[0]),
                "kl_from_unsteered": reference.kl(here, targets[1]),
            }
            assert {k: row[k] for k in expected} == pytest.approx(expected, abs=2e-4), (kind, name)


def test_without_a_vector_frozen_attention_is_free_and_everything_is_put_back(study):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    rows = evaluate("frozen", study, Vectors("unsteered", [0], ZERO[None]))["frozen"].to_pylist()
    assert [row["kl_from_unsteered"] for row in rows] == pytest.approx([0, 0], abs=1e-6)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_a_model_whose_attention_cannot_be_frozen_says_so(study, chain):
    rows = evaluate("frozen", dataclasses.replace(study, model=tiny("bloom")), chain)
    assert rows["failures"].num_rows == 0
    assert set(rows["frozen"]["left_out"].to_pylist()) == {frozen.LEFT_OUT}
    assert set(rows["frozen"]["kl_from_base"].to_pylist()) == {None}


def ablated(study, tokens, unit):
    """The unsteered stream's last token at every layer after the source, each without its component along `unit`."""
    unit, found = torch.as_tensor(unit).float(), []

    def project(_layer, _args, output):
        h = stream(output)
        h = h - (h @ unit)[..., None] * unit
        found.append(h[0, -1].double().numpy())
        return with_stream(output, h)

    handles = [layer.register_forward_hook(project) for layer in study.model.layers[study.config.source_layer :]]
    with torch.no_grad():
        study.model.network(tokens[None])
    for handle in handles:
        handle.remove()
    return np.stack(found)[1:]


def profile(h, other):
    return h @ other.numpy() / np.linalg.norm(h, axis=-1) / np.linalg.norm(other)


def test_the_change_of_a_profile_is_that_of_plain_transformers(study, chain):
    rows = evaluate("independence", study, chain)["independence"]
    assert rows.num_rows == 2 * 2 * 5
    prompts = [reference.prompt_tokens(study, text) for text in (None, *study.concept.held_out.values())]
    for kind, theta in (("chain", chain.theta[2]), ("random", null_of(study, 3, chain.norms[2]))):
        for name, pair in {"vector": (theta, study.base), "base": (study.base, theta)}.items():
            out, other = pair
            (row,) = rows_of(rows, kind=kind, index=3, ablated=name)
            unit = out / out.norm()
            plain = np.stack([profile(ablated(study, tokens, ZERO), other) for tokens in prompts])
            changed = np.stack([profile(ablated(study, tokens, unit), other) for tokens in prompts])
            assert row["change"] == pytest.approx(np.sqrt(((changed - plain) ** 2).mean()), abs=1e-5)
            assert row["profile"] == pytest.approx(np.sqrt((plain**2).mean()), abs=1e-5)


def test_losses_texts_and_natural_shares(study, chain):
    rows = evaluate("efficiency", study, chain)["efficiency"]
    assert rows.num_rows == 2 * 5
    theta = chain.theta[0]
    (row,) = rows_of(rows, kind="chain", index=1)
    unit = theta / theta.norm()
    scaled = torch.stack([unit * r * study.radius for r in RADII])
    assert [row[f"loss_at_{r}r"] for r in RADII] == pytest.approx(real_losses(study, scaled), abs=1e-5)
    assert row["loss_own"] == pytest.approx(real_losses(study, theta[None])[0], abs=1e-5)
    tokens = [study.model.tokenizer(text)["input_ids"][:24] for text in study.concept.neutral_texts]
    divergence = []
    for ids in map(torch.tensor, tokens):
        here, plain = (reference.log_probs(study, ids, one) for one in (unit * study.radius, ZERO))
        divergence += [reference.kl(here[i], plain[i]) for i in range(1, len(ids) - 1)]
    assert row["kl_neutral"] == pytest.approx(np.mean(divergence), rel=1e-3)
    h = np.concatenate([part.h[~part.sink].double().numpy() for pair in text_sets(study).values() for part in pair])
    assert row["natural_share"] == pytest.approx((profile(h, theta) ** 2).max(), rel=1e-4)
    assert len(neutral(study)[1]) == len(study.concept.neutral_texts)


def test_noise_is_orthogonal_and_of_the_size_told(study, chain, monkeypatch):
    asked = []
    monkeypatch.setattr("melbo_ray.evals.efficiency.real_losses", lambda _, thetas: asked.append(thetas) or [0.0] * 5)
    evaluate("efficiency", study, chain)
    for noisy, size in zip(asked[len(RADII) + 1 :], NOISE, strict=False):
        noise = noisy - chain.theta
        assert noise.norm(dim=-1).numpy() == pytest.approx(size * np.array(chain.norms), rel=1e-4)
        assert (noise * chain.theta).sum(-1).numpy() == pytest.approx(np.zeros(5), abs=1e-4)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_the_exponent_of_a_known_contour_is_found(p):
    angles = np.deg2rad([0, 22.5, 45, 67.5, 90])
    norms = ((np.cos(angles) / 3) ** p + (np.sin(angles) / 5) ** p) ** (-1 / p)
    assert privileged.exponent(dict(zip((0, 22.5, 45, 67.5, 90), norms, strict=True))) == pytest.approx(p, abs=0.01)


def test_of_a_linear_map_two_orthogonal_effects_have_exponent_2_and_one_effect_1(study, monkeypatch):
    axes = torch.eye(D_MODEL)
    same = torch.zeros(D_MODEL, D_MODEL)
    same[0, :2] = 1
    for matrix, p in ((axes, 2), (same, 1)):
        monkeypatch.setattr(privileged, "moved", lambda _, thetas, m=matrix: (thetas @ m.T).norm(dim=-1))
        fresh = dataclasses.replace(study)
        assert privileged._fit(fresh, axes[0], axes[1])["p"] == pytest.approx(p, abs=0.02)


def test_the_norms_of_mixtures_have_half_of_the_bases_effect(study, chain):
    rows = evaluate("privileged", study, chain)["privileged"]
    tokens, layer = reference.prompt_tokens(study), study.config.target_layer
    z = lambda theta: streams(study, tokens, theta)[layer][1:].mean(0)  # noqa: E731
    moved = lambda theta: z(theta) - z(ZERO)  # noqa: E731
    goal = np.linalg.norm(moved(study.base)) / 2
    for row in rows_of(rows, kind="chain", partner="base"):
        assert (row["p"] is None) == (row["left_out"] is not None)
        unit = chain.theta[row["index"] - 1] / chain.norms[row["index"] - 1]
        if row["norm_pure"] is not None:
            assert np.linalg.norm(moved(unit * row["norm_pure"])) == pytest.approx(goal, rel=0.1)
    assert {row["partner"] for row in rows.to_pylist()} == {"base", "random"}
    assert len(rows) == 2 * 2 * 5


def test_the_base_is_mixed_with_the_mean_difference_where_there_are_contrast_prompts(study):
    base = Vectors("base", [0], study.base[None])
    concept = study.concept.model_copy(update={"contrast": ["Write code.", "Write a function."]})
    for each, partners in ((study, {"random"}), (dataclasses.replace(study, concept=concept), {"random", "contrast"})):
        assert {row["partner"] for row in evaluate("privileged", each, base)["privileged"].to_pylist()} == partners


def test_where_no_norm_suffices_it_is_left_out_with_the_reason(study, chain, monkeypatch):
    monkeypatch.setattr(privileged, "_goal", lambda _: 1e9)
    rows = evaluate("privileged", dataclasses.replace(study), chain)["privileged"].to_pylist()
    assert {row["p"] for row in rows} == {None}
    assert {row["left_out"] for row in rows} == {"no norm up to 8 R has half of the base's effect"}
