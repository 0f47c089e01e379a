"""Participation ratios and alignments against other formulas of theirs."""

import numpy as np
import pytest

from melbo_ray.report.spread import alignment, participation


def test_the_participation_ratio_is_that_of_the_eigenvalues():
    draws = np.random.default_rng(0).normal(size=(7, 20)) + 2
    units = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    eigen = np.linalg.eigvalsh(units @ units.T)
    assert participation(draws) == pytest.approx(eigen.sum() ** 2 / (eigen**2).sum())
    assert participation(np.eye(5)) == pytest.approx(5)
    assert participation(np.ones((5, 3))) == pytest.approx(1)


def test_the_alignment_is_that_of_singular_vectors():
    """The mean of squared cosines between principal components, weighted by their variances (Kornblith et al. 2019)."""
    draws = np.random.default_rng(1)
    one, other = draws.normal(size=(9, 4)), draws.normal(size=(9, 30)) + 5
    (u, s, _), (v, t, _) = (np.linalg.svd(x - x.mean(0), full_matrices=False) for x in (one, other))
    expected = (np.outer(s**2, t**2) * (u.T @ v) ** 2).sum() / np.linalg.norm(s**2) / np.linalg.norm(t**2)
    assert alignment(one, other) == pytest.approx(expected)


def test_vectors_that_differ_alike_are_aligned_however_they_are_turned_scaled_or_shifted():
    draws = np.random.default_rng(2)
    one, turn = draws.normal(size=(9, 5)), np.linalg.qr(draws.normal(size=(5, 5)))[0]
    assert alignment(one, 3 * one @ turn + 7) == pytest.approx(1)
    assert alignment(one, np.ones((9, 5))) == 0


def test_of_orthogonal_vectors_of_one_norm_it_is_the_participation_ratio_of_what_is_left_of_their_differences():
    draws = np.random.default_rng(3)
    source, end = (
        np.linalg.qr(draws.normal(size=(40, 9)))[0].T * 4,
        draws.normal(size=(9, 6)) @ draws.normal(size=(6, 40)),
    )
    centred = end - end.mean(0)
    values = np.linalg.eigvalsh(centred @ centred.T)
    assert alignment(source, end) == pytest.approx(np.sqrt(values.sum() ** 2 / (values**2).sum() / 8))
