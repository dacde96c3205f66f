"""The similarity reference against a full sort in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.kernels import similarity
from accel.kernels.similarity import inverse_norm, top_k


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_sort(queries, store, k, allowed=None, normalized=False):
    """Every score in fp64, sorted by score and then by index, one query at a time."""
    scores, indices = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    x = store.double().numpy()
    for row, q in enumerate(queries.double().numpy()):
        cosine = x @ q
        if not normalized:
            norms = np.linalg.norm(x, axis=1) * np.linalg.norm(q)
            cosine = np.divide(cosine, norms, out=np.zeros_like(cosine), where=norms > 0)
        # ties are meant up to fp32, where the inverse norms are rounded
        rows = (
            np.arange(len(x))
            if allowed is None
            else np.flatnonzero(np.broadcast_to(allowed, (len(queries), len(x)))[row])
        )
        order = rows[np.lexsort((rows, -np.round(cosine[rows], 7)))][:k]
        scores[row, : len(order)], indices[row, : len(order)] = cosine[order], order
    return scores, indices


def assert_same(got, expected):
    np.testing.assert_array_equal(got.indices.numpy(), expected[1])
    np.testing.assert_allclose(got.scores.numpy(), expected[0], atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 6, 64])
@pytest.mark.parametrize(("Q", "N", "D"), [(1, 1, 1), (1, 20, 384), (5, 500, 384), (33, 1000, 17), (2, 5, 3)])
def test_it_is_the_head_of_a_full_sort(Q, N, D, k):
    queries, store = normal(Q, D), normal(N, D, seed=1) * torch.linspace(0.1, 9, N)[:, None]
    assert_same(top_k(queries, store, k), full_sort(queries, store, k))


# small integers: every product is exact and many rows are alike
VECTORS = st.lists(st.tuples(*[st.integers(-1, 1)] * 3), min_size=1, max_size=30)


@given(queries=VECTORS, store=VECTORS, k=st.integers(1, 8), chunk=st.integers(1, 9))
def test_ties_go_to_the_lower_index_whatever_the_chunks(queries, store, k, chunk):
    queries, store = torch.tensor(queries).float(), torch.tensor(store).float()
    previous, similarity.reference.SCORES = similarity.reference.SCORES, chunk * len(queries)
    try:
        assert_same(top_k(queries, store, k, normalized=True), full_sort(queries, store, k, normalized=True))
        assert_same(top_k(queries, store, k), full_sort(queries, store, k))
    finally:
        similarity.reference.SCORES = previous


def test_zero_vectors_are_like_nothing_and_unlike_nothing():
    store = torch.tensor([[-1.0, 0], [0, 0], [2, 0], [0, 0], [0, -0.0]])
    got = top_k(torch.tensor([[3.0, 0], [0, 0]]), store, 5)
    assert got.indices.tolist() == [[2, 1, 3, 4, 0], [0, 1, 2, 3, 4]]
    assert got.scores.tolist() == [[1, 0, 0, 0, -1], [0] * 5]
    assert inverse_norm(store).tolist() == [1, 0, 0.5, 0, 0]


def test_excluded_rows_do_not_come_back():
    queries, store = normal(4, 8), normal(50, 8, seed=1)
    by_row = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.5
    by_query = torch.rand(4, 50, generator=torch.Generator().manual_seed(3)) < 0.9
    by_query[0] = True
    assert_same(top_k(queries, store, 6, exclude=by_row), full_sort(queries, store, 6, ~by_row.numpy()))
    got = top_k(queries, store, 6, exclude=by_query)
    assert_same(got, full_sort(queries, store, 6, ~by_query.numpy()))
    assert got.indices[0].tolist() == [-1] * 6 and got.scores[0].eq(-torch.inf).all()


def test_a_store_smaller_than_k_is_filled_up():
    got = top_k(torch.ones(1, 2), torch.ones(2, 2), 4)
    assert got.indices.tolist() == [[0, 1, -1, -1]] and got.scores[0, 2:].tolist() == [-torch.inf] * 2
    empty = top_k(torch.ones(3, 2), torch.ones(0, 2), 2)
    assert empty.indices.tolist() == [[-1, -1]] * 3
    assert top_k(torch.ones(0, 2), torch.ones(4, 2), 2).indices.shape == (0, 2)


def test_prepared_norms_and_normalised_vectors_give_the_same():
    queries, store = normal(3, 20), normal(100, 20, seed=1) * 5
    plain = top_k(queries, store, 5)
    prepared = top_k(queries, store, 5, inverse_norms=inverse_norm(store))
    units = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(store)
    for got in (prepared, top_k(*units, 5, normalized=True)):
        assert torch.equal(got.indices, plain.indices)
        torch.testing.assert_close(got.scores, plain.scores)


def test_half_precision_is_summed_in_fp32():
    queries, store = normal(3, 384).bfloat16(), normal(200, 384, seed=1).bfloat16()
    got = top_k(queries, store, 5)
    assert got.scores.dtype == torch.float32 and got.indices.dtype == torch.int64
    assert_same(got, full_sort(queries.float(), store.float(), 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k=0: must be in 1\.\.64"),
        ({"k": 65}, "k=65"),
        ({"store": torch.ones(4, 5)}, r"queries is \[2, 3\], store \[4, 5\]"),
        ({"store": torch.ones(4, 3).half()}, "cast the queries"),
        ({"inverse_norms": torch.ones(2)}, r"inverse_norms is torch.float32 \[2\]"),
        ({"inverse_norms": torch.ones(4), "normalized": True}, "not both"),
        ({"exclude": torch.ones(4)}, "exclude is torch.float32"),
        ({"exclude": torch.ones(3, 4, dtype=torch.bool)}, r"or \[Q, N\] = \[2, 4\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        top_k(**{"queries": torch.ones(2, 3), "store": torch.ones(4, 3), "k": 2, **change})
    assert "\n" not in str(caught.value)
