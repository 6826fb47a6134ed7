"""Rotations, square roots and eigenvectors."""

import pytest
import torch

from headq_ao.codecs.linalg import centred_moment, eigh, ridged, rotation_matrix, square_roots, top_eigenvectors
from tests.codecs.states import randn, second_moment


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 240, 256])
def test_rotation_is_orthogonal_and_flat(head_dim):
    r = rotation_matrix(head_dim)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r.double() @ r.double().T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-6)
    # Hadamard entries are ±1/√D; the cosine part of an odd factor at most √2 of that
    assert float(r.abs().max()) * head_dim**0.5 <= (1.0 if head_dim & (head_dim - 1) == 0 else 2**0.5) + 1e-5
    assert torch.equal(rotation_matrix(head_dim, hadamard=False), torch.eye(head_dim))


def test_square_roots_survive_a_singular_c_q():
    q = randn(1, 1, 4, 16)
    c_q = second_moment(q)  # rank 4 of 16
    root, inverse = square_roots(c_q)
    torch.testing.assert_close(root @ inverse, torch.eye(16, dtype=torch.float64)[None, None], rtol=0, atol=1e-9)
    torch.testing.assert_close(root @ root, c_q, rtol=0, atol=2e-6 * float(torch.linalg.eigvalsh(c_q).max()))
    for x in square_roots(torch.zeros(1, 1, 16, 16)):
        assert bool(torch.isfinite(x).all())


def test_top_eigenvectors_do_not_flip():
    c = second_moment(randn(1, 1, 64, 16))
    u = top_eigenvectors(c, 16)
    assert torch.equal(u.sign(), top_eigenvectors(c * (1 + 1e-15), 16).sign())
    order = (u.mT @ c @ u).diagonal(dim1=-2, dim2=-1)
    assert bool((order.diff() <= 1e-12).all()), "largest first"


def test_a_centred_moment_is_the_covariance():
    x = randn(2, 500, 8) + 3
    covariance = torch.stack([torch.cov(rows.T, correction=0) for rows in x])
    torch.testing.assert_close(centred_moment(x.mean(-2), second_moment(x)), covariance)


def test_a_ridge_is_a_share_of_the_mean_eigenvalue():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(ridged(matrix, 0.5), torch.diag(torch.tensor([2.5, 3.5, 7.5])))
    assert bool((ridged(torch.zeros(3, 3), 0.5).diagonal() > 0).all()), "what is zero can be inverted afterwards"


def test_eigenvectors_of_what_is_not_finite():
    """Such a sequence must not fail its batch: the others' are theirs."""
    matrix = torch.stack([torch.diag(torch.tensor([4.0, 1.0])), torch.full((2, 2), torch.inf)])
    values, vectors = eigh(matrix)
    assert values.tolist() == [[1.0, 4.0], [0.0, 0.0]] and values.dtype == torch.float64
    torch.testing.assert_close(vectors[0].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
