"""The similarity kernels against their reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, assert_equal, random

from accel.kernels.similarity import inverse_norm, reference
from accel.kernels.similarity import triton as kernels

pytestmark = pytest.mark.kernel


def compare(got, expected):
    assert_equal(got.indices, expected.indices, "indices")
    assert_close(got.scores, expected.scores, what="scores")


def check(module, Q=3, N=200, D=40, k=4, **options):
    queries = random(Q, D)
    # lengths far from one
    store = random(N, D, seed=1) * torch.linspace(0.1, 9, max(N, 1), device=DEVICE)[:N, None]
    compare(module.top_k(queries, store, k, **options), reference.top_k(queries, store, k, **options))


def whole_numbers(*shape, seed=0, limit=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float().to(DEVICE)


def check_ties(module, Q=3, N=300, k=7, **options):
    # few different vectors: every product is exact, most scores are tied
    queries, store = whole_numbers(Q, 3), whole_numbers(N, 3, seed=1)
    got = module.top_k(queries, store, k, **options)
    assert torch.equal(got.scores, reference.top_k(queries, store, k, **options).scores)
    compare(got, reference.top_k(queries, store, k, **options))


def excluded(*shape, share=0.8, seed=5):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


@pytest.mark.parametrize(
    ("Q", "N", "D", "k"),
    [
        (1, 1, 1, 1), (1, 127, 31, 3), (1, 300, 384, 6), (2, 128, 32, 8), (16, 129, 33, 3), (17, 65, 64, 6),
        (33, 63, 9, 1),
    ],
)  # fmt: skip
def test_sizes_around_the_tiles(Q, N, D, k):
    check(kernels, Q, N, D, k)


@pytest.mark.parametrize(("N", "k"), [(0, 3), (2, 6), (9, 9), (20, 64)])
def test_fewer_rows_than_asked_for(N, k):
    check(kernels, 1, N, 5, k)
    check(kernels, 2, N, 5, k)


@pytest.mark.parametrize("Q", [1, 3, 17])
def test_ties_go_to_the_lower_index(Q):
    check_ties(kernels, Q)
    check_ties(kernels, Q, normalized=True)


def test_more_places_than_eight():
    check(kernels, 1, 300, 16, 20)
    check_ties(kernels, 2, 150, 12)


@pytest.mark.parametrize("Q", [1, 3])
def test_several_tiles_in_a_part(Q, monkeypatch):
    monkeypatch.setattr(kernels, "PARTS", 2)
    check(kernels, Q, 700, 20, 6)
    check_ties(kernels, Q, 700)
    # worst first: every tile has better rows than all before it
    store = torch.linspace(-1, 1, 600, device=DEVICE)[:, None] * torch.ones(1, 3, device=DEVICE)
    store[:, 0] = 1
    queries = torch.tensor([[0.0, 1, 1]], device=DEVICE).expand(Q, 3)
    compare(kernels.top_k(queries, store, 5), reference.top_k(queries, store, 5))


def test_more_keys_than_the_join_takes_at_once():
    assert kernels.KEYS < 22_100 // 128 * 6
    check(kernels, 1, 22_100, 3, 6)


def test_excluded_rows():
    for Q in (1, 3):
        check(kernels, Q, exclude=excluded(200))
        check(kernels, Q, exclude=excluded(Q, 200))
        check(kernels, Q, exclude=excluded(200, share=1.1))


def test_prepared_norms_and_normalised_vectors():
    store = random(200, 40, seed=1) * torch.linspace(0.1, 9, 200, device=DEVICE)[:, None]
    for Q in (1, 3):
        check(kernels, Q, inverse_norms=inverse_norm(store))
        check(kernels, Q, normalized=True)


def test_zero_vectors():
    queries, store = whole_numbers(4, 5), whole_numbers(150, 5, seed=1)
    queries[1], store[::3] = 0, 0
    for some in (queries, queries[1:2], queries[2:3]):
        compare(kernels.top_k(some, store, 8), reference.top_k(some, store, 8))


def test_strided_rows_and_nothing_else():
    wide = torch.full((150, 60), torch.nan, device=DEVICE)
    wide[:, 10:47] = random(150, 37, seed=1)
    queries = random(37, 3).T
    for some in (queries, queries[:1]):
        compare(kernels.top_k(some, wide[:, 10:47], 5), reference.top_k(some, wide[:, 10:47], 5))


def test_no_queries():
    assert kernels.top_k(random(0, 4), random(9, 4), 2).indices.shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("Q", [1, 16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, Q):
    # products of half precision are exact in fp32: only the order of the sum differs
    queries, store = random(Q, 384, dtype=dtype), random(20_000, 384, seed=1, dtype=dtype)
    got, expected = kernels.top_k(queries, store, 6), reference.top_k(queries, store, 6)
    assert_close(got.scores, expected.scores, what="scores")
    # two scores within the sum's rounding may change places
    assert (got.indices == expected.indices).double().mean() > 0.99


@pytest.mark.gpu
def test_a_store_past_32_bit_offsets():
    D = 1024
    store = torch.zeros(2**21 + 50, D, dtype=torch.float16, device=DEVICE)
    store[2**21 + 33, 5] = 1
    got = kernels.top_k(torch.ones(1, D, dtype=torch.float16, device=DEVICE), store, 1)
    assert got.indices.tolist() == [[2**21 + 33]]


MUTATIONS = [
    ("_part", "mask off by one", "m_n = o_n < N", "m_n = o_n < N - 1",
     lambda m: check(m, N=3)),
    ("_part", "not normalised by the row", "scores * of_row[None, :] * of_query[:, None]", "scores * of_query[:, None]",
     check),
    ("_part", "wrong row stride", "o_r[:, None] * stride_n", "o_r[:, None] * (stride_n - 1)", check),
    ("_part", "ties to the higher index", "4294967295 - o_n.to(tl.int64)", "o_n.to(tl.int64)", check_ties),
    ("_part", "negative scores backwards", "bits ^ 0x7FFFFFFF, bits)", "bits, bits)",
     lambda m: check(m, N=6, k=6)),
    ("_part", "exclusion ignored", "== 0)\n        best", ">= 0)\n        best",
     lambda m: check(m, exclude=excluded(200))),
    ("_part", "part left out", "range(0, part_size, b_N)", "range(b_N, part_size + b_N, b_N)", check),
    ("_join", "mask off by one", "o_key < n_keys", "o_key < n_keys - 1", lambda m: check(m, Q=1, N=4)),
    ("_join", "wrong row stride", "i_q * n_keys + o_key", "i_q * k + o_key", check),
    ("_join", "worst first", "key = tl.max(tl.max(best, 1), 0)",
     "key = tl.min(tl.min(tl.where(best == NOTHING, 9223372036854775807, best), 1), 0)", check),
    ("_join", "empty places returned", "found = key >= NOTHING + 1 + b_K", "found = key > 9223372036854775806",
     lambda m: check(m, N=3)),
]  # fmt: skip
