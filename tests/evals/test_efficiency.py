"""Losses, KL on neutral text and natural shares, against plain transformers."""

import numpy as np
import pytest
import torch

from melbo_ray.evals.runner import evaluate
from melbo_ray.seeds import derive_seed
from tests.evals import reference
from tests.evals.reference import null_of, profile, read, relative_loss, rows_of, without_sinks, written_sets
from tests.families import D_MODEL

ZERO = torch.zeros(D_MODEL)


def noise_of(study, kind, index, theta):
    """A seeded normal draw, orthogonal to the vector and of its norm, by NumPy."""
    seed = derive_seed(study.config.seed, study.concept.name, index, f"efficiency/{kind}")
    draw = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    theta = theta.double().numpy()
    rest = draw - (draw @ theta) / (theta @ theta) * theta
    return rest / np.linalg.norm(rest) * np.linalg.norm(theta)


def test_losses_at_equal_norms_and_under_noise_are_those_of_plain_transformers(study, chain):
    rows = evaluate("efficiency", study, chain)["efficiency"]
    assert rows.num_rows == 2 * 5
    for kind, theta in (("chain", chain.theta[0]), ("random", null_of(study, 1, chain.norms[0]))):
        (row,) = rows_of(rows, kind=kind, index=1)
        unit, noise = theta / theta.norm(), torch.from_numpy(noise_of(study, kind, 1, theta))
        expected = {f"loss_at_{r}r": relative_loss(study, unit * r * study.radius) for r in (1, 2, 4)}
        expected |= {"norm": chain.norms[0], "loss_own": relative_loss(study, theta)}
        expected |= {"loss_noise_05": relative_loss(study, theta.double() + 0.5 * noise)}
        expected |= {"loss_noise_10": relative_loss(study, theta.double() + noise)}
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4), kind


def test_the_divergence_on_neutral_texts_and_the_natural_share_are_those_of_plain_transformers(study, chain):
    (row,) = rows_of(evaluate("efficiency", study, chain.take([0]))["efficiency"], kind="chain", index=1)
    steered = chain.theta[0] / chain.norms[0] * study.radius
    divergence = []
    for text in study.concept.neutral_texts:
        ids = torch.tensor(study.model.tokenizer(text)["input_ids"][:24])
        here, plain = (reference.log_probs(study, ids, one) for one in (steered, ZERO))
        divergence += [reference.kl(here[i], plain[i]) for i in range(1, len(ids) - 1)]
    assert row["kl_neutral"] == pytest.approx(np.mean(divergence), rel=1e-3)
    sets = [read(study, study.concept.texts), read(study, study.concept.neutral_texts), *written_sets(study)]
    h = np.concatenate([without_sinks(part) for part in sets])
    assert row["natural_share"] == pytest.approx((profile(h, chain.theta[0]) ** 2).max(), rel=1e-4)
