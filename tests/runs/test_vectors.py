"""A run's vectors as arrays: what is stored, in order, with slices that stay arrays."""

import numpy as np
import pytest

from melbo_ray import Run, UserError
from tests.studies import norm_of, write_study

N = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), concepts=("alien", "code"), num_vectors=N)


def test_item_n_is_vector_n_with_its_certificate_and_place(folder):
    vectors = Run(folder).vectors("code")
    assert len(vectors) == N + 1
    one = vectors[3]
    assert (one.index, one.norm, one.stop_reason) == (3, pytest.approx(norm_of(3, N)), "converged")
    assert one.theta.dtype == np.float32
    assert one.theta.tolist() == pytest.approx([norm_of(3, N), 0, 0, 0])
    assert (one.site.layer, one.site.model, one.site.fingerprint) == (8, "tiny", "sha256:0123456789abcdef")
    assert [vector.index for vector in vectors] == list(range(N + 1))
    assert vectors[-1].index == N


def test_columns_and_slices_are_arrays(folder):
    vectors = Run(str(folder)).vectors("code")
    assert vectors.theta.shape == (N + 1, 4)
    assert np.array_equal(np.asarray(vectors), vectors.theta)
    assert np.array_equal(np.asarray(vectors[2], dtype=float), vectors.theta[2])
    some = vectors[1:5:2]
    assert (some.index.tolist(), some[0].index, len(some)) == ([1, 3], 1, 2)
    assert np.array_equal(some.theta, vectors.theta[[1, 3]])
    assert vectors[::-1].norm.tolist() == vectors.norm.tolist()[::-1]
    assert vectors.loss[3] == pytest.approx(vectors[3].loss)
    vectors.theta[:] = 0  # a copy, which may be written to
    assert vectors.theta.any()


def test_what_is_not_there_is_one_error(folder, tmp_path):
    run = Run(folder)
    with pytest.raises(UserError, match=r"no vector 7: expected 0 .* to 6"):
        run.vectors("code")[N + 1]
    with pytest.raises(IndexError):
        run.vectors("code")[-N - 2]
    with pytest.raises(UserError, match="no concept 'stem': expected one of alien, code"):
        run.vectors("stem")
    with pytest.raises(UserError, match="several concepts"):
        run.vectors()
    with pytest.raises(UserError, match="no run at"):
        Run(tmp_path / "nowhere").vectors("code")
    empty = write_study(tmp_path, "empty", without=("vectors",))
    with pytest.raises(UserError, match="no base vector of code yet"):
        Run(empty).vectors("code")


def test_the_only_concept_needs_no_name(tmp_path):
    assert len(Run(write_study(tmp_path, num_vectors=2)).vectors()) == 3
