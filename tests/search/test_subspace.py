import numpy as np
import pytest
import torch

from melbo_ray.search.subspace import Subspace, disentangle, max_abs_cos


def test_what_is_removed_is_the_projection_that_numpy_computes():
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    subspace = Subspace(16, capacity=4)
    for vector in vectors[:4]:
        subspace.add(vector)
    q, _ = np.linalg.qr(vectors[:4].double().numpy().T)
    expected = vectors[4].double().numpy() - q @ (q.T @ vectors[4].double().numpy())
    np.testing.assert_allclose(subspace.remove(vectors[4]).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(subspace.remove_exact(vectors[4]).numpy(), expected, atol=1e-12)


def test_a_batch_is_projected_row_by_row():
    subspace = Subspace(8, capacity=2)
    subspace.add(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    batch = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(subspace.remove(batch), torch.stack([subspace.remove(row) for row in batch]))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_the_whole_space_stays_orthogonal_to_float32_precision(device):
    d_model = 512
    subspace, kept = Subspace(d_model, d_model, device), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(d_model):
        # Norms and scales vary as they do in a chain; near the end almost nothing of a random vector is left.
        vector = subspace.remove_exact(subspace.remove(torch.randn(d_model, generator=generator) * 40)).float()
        kept.append(vector)
        subspace.add(vector)
    assert max_abs_cos(torch.stack(kept)) < 1e-6
    assert float((subspace.basis @ subspace.basis.T - torch.eye(d_model, device=device)).abs().max()) < 1e-6


def test_adding_tells_the_largest_cosine_with_what_was_there():
    subspace = Subspace(3, capacity=3)
    assert subspace.add(torch.tensor([2.0, 0, 0])) == 0
    assert subspace.add(torch.tensor([3.0, 4, 0])) == pytest.approx(0.6)


def test_max_abs_cos_sees_one_pair_that_is_not_orthogonal():
    vectors = torch.eye(4)
    assert max_abs_cos(vectors) == 0
    vectors[3, 0] = -1
    assert max_abs_cos(vectors) == pytest.approx(2**-0.5)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.tensor([float("nan"), 0, 0]), torch.tensor([5.0, 0, 0])])
def test_a_direction_that_is_none_or_taken_is_refused(bad):
    subspace = Subspace(3, capacity=3)
    subspace.add(torch.tensor([1.0, 0, 0]))
    with pytest.raises(ValueError, match=r"direction|span"):
        subspace.add(bad)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_disentangled_vectors_have_the_directions_of_the_polar_factor_and_their_own_norms(rows):
    generator = torch.Generator().manual_seed(rows)
    vectors = torch.randn(rows, 64, generator=generator) * torch.rand(rows, 1, generator=generator)
    vectors = vectors + 0.5 * vectors.norm(dim=-1, keepdim=True) / 8 * torch.randn(64, generator=generator)
    norms = np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True)
    u, _, v = np.linalg.svd(vectors.double().numpy() / norms, full_matrices=False)
    np.testing.assert_allclose(disentangle(vectors).numpy(), norms * (u @ v), atol=1e-9)
    assert torch.autograd.gradcheck(disentangle, vectors.double().requires_grad_()) if rows < 5 else True


def chain_of(n, d_model, seed=0):
    """Vectors of a chain, orthogonal to float32, at several norms; of the first two, as of a base's rows, not so."""
    draws = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.linalg.qr(draws.T)[0].T * torch.linspace(0.1, 50, n)[:, None]
    rows[1] += 0.4 * rows[0]
    return rows.float()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("added", [0, 1, 63, 64, 100])
def test_many_vectors_at_once_give_the_basis_that_they_give_one_by_one_to_the_bit(n, added):
    vectors = chain_of(200, 256)[:n]
    one_by_one, at_once = Subspace(256, 220), Subspace(256, 220)
    for vector in vectors:
        one_by_one.add(vector)
    for vector in vectors[:added]:
        at_once.add(vector)
    at_once.extend(vectors[added:])
    assert at_once.size == one_by_one.size == n
    assert torch.equal(at_once._exact, one_by_one._exact)
    assert torch.equal(at_once.basis, one_by_one.basis)
    for subspace in (one_by_one, at_once):  # and what is added later
        for vector in chain_of(220, 256, seed=3)[200 - n :][:20]:
            subspace.add(vector)
    assert torch.equal(at_once._exact, one_by_one._exact)


def test_a_basis_made_in_blocks_spans_what_the_vectors_do():
    vectors = chain_of(150, 160).double()
    subspace = Subspace(160, 150)
    subspace.extend(vectors.float())
    q, _ = np.linalg.qr(vectors.float().double().numpy().T)
    basis = subspace._exact.numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(150), atol=1e-14)
    np.testing.assert_allclose(basis.T @ basis, q @ q.T, atol=1e-12)
    # Each has the direction and the sign that Gram-Schmidt gives.
    assert (np.einsum("ij,ij->i", basis, vectors.numpy()) > 0).all()


def test_a_basis_of_many_vectors_takes_no_product_for_each(monkeypatch):
    subspace, added = Subspace(512, 512), []
    monkeypatch.setattr(subspace, "add", added.append)
    subspace.extend(chain_of(64 * 7, 512))
    assert not added


@pytest.mark.parametrize("bad", [7, 70])
def test_of_many_vectors_one_within_the_span_is_refused(bad):
    vectors = chain_of(80, 128)
    vectors[bad] = vectors[2] - vectors[5]
    with pytest.raises(ValueError, match="span"):
        Subspace(128, 128).extend(vectors)
    vectors[bad] = 0
    with pytest.raises(ValueError, match="direction"):
        Subspace(128, 128).extend(vectors)


def test_max_abs_cos_of_many_sees_every_pair():
    vectors = torch.eye(1100)
    assert max_abs_cos(vectors) == 0
    for first, second in ((0, 1099), (600, 601), (511, 512)):
        vectors[second, first] = 0.5
        assert max_abs_cos(vectors) == pytest.approx(0.5 / 1.25**0.5)
        vectors[second, first] = 0
