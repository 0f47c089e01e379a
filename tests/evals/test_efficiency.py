"""Losses, KL on neutral text and natural shares, against plain transformers."""

import numpy as np
import pytest
import torch

from melbo_ray.evals.efficiency import NOISE, RADII, neutral
from melbo_ray.evals.linear import real_losses
from melbo_ray.evals.presence import text_sets
from melbo_ray.evals.runner import evaluate
from tests.evals import reference
from tests.evals.reference import profile, rows_of
from tests.families import D_MODEL

ZERO = torch.zeros(D_MODEL)


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
