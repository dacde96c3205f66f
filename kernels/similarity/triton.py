"""Triton kernels of the similarity family: the k best of every part of the store, and the k best of all parts.

A score and its row number are one 64-bit key: the larger key is the better row, and no two are equal. A program keeps
its k best in registers and looks closer at a tile only while it holds a better one, which soon is rare: the store is
read once, at the memory's pace, and no score is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.similarity.reference import Neighbours

# parts that a large store is split into: some four programs for each processor of a large GPU
PARTS = 512
# keys that the join looks at at a time
KEYS = 1024
# below the key of any score; Triton reads globals only as constexpr
NOTHING = tl.constexpr(-(2**63))


class Tiles(NamedTuple):
    """Queries of a program, rows and dimensions it reads at a time, warps, and reads under way."""

    b_Q: int
    b_N: int
    b_D: int
    num_warps: int
    num_stages: int


def tiles(Q: int, element_size: int, normalized: bool) -> Tiles:
    """The tiles for Q queries: one needs no matrix units; up to 16 share one reading of the store."""
    b_D = 32 if element_size == 4 else 64
    if Q == 1:
        return Tiles(1, 128, b_D, 4, 3)
    if element_size == 4:
        # one more than two spills
        return Tiles(16, 64, b_D, 8, 2 if normalized else 3)
    return Tiles(16, 128, b_D, 8, 3)


@triton.jit
def _inverse(squares):
    """1 / √squares rounded as IEEE asks for, so that equal scores are equal everywhere; 0 for a zero vector."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm > 0, tl.div_rn(1.0, tl.where(norm > 0, norm, 1.0)), 0.0)


@triton.jit
def _keep(best, keys):
    """best [Q, K], unordered, and new keys [Q, n] → the K largest of both."""
    least = tl.min(best, 1)
    largest = tl.max(keys, 1)
    while tl.max((largest > least).to(tl.int32), 0) > 0:
        better = largest > least
        best = tl.where((best == least[:, None]) & better[:, None], largest[:, None], best)
        keys = tl.where(keys == largest[:, None], NOTHING, keys)
        least = tl.min(best, 1)
        largest = tl.max(keys, 1)
    return best


@triton.jit
def _empty(b_Q: tl.constexpr, b_K: tl.constexpr, k):
    """[b_Q, b_K] places for k keys a query: different ones, below every key; those after the k-th are never taken."""
    o_k = tl.arange(0, b_K).to(tl.int64)
    places = tl.where(o_k < k, NOTHING + 1 + o_k, 9223372036854775807)
    return tl.zeros((b_Q, b_K), tl.int64) + places[None, :]


@triton.jit
def _part(
    p_query, p_store, p_inverse, p_exclude, p_key, stride_q, stride_n, stride_e, Q, N, D, k, part_size, n_parts,
    NORMALIZED: tl.constexpr, b_Q: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr, b_K: tl.constexpr,
):  # fmt: skip
    """The k best rows of part i_p of the store for queries i_q."""
    i_q, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_q, o_r, o_d = tl.arange(0, b_Q), tl.arange(0, b_N), tl.arange(0, b_D)
    m_q = i_q * b_Q + o_q < Q
    # 64 bits for where a tile begins, 32 within it
    p_query += i_q * b_Q * stride_q
    best = _empty(b_Q, b_K, k)
    if not NORMALIZED:
        squares = tl.zeros((b_Q, b_D), tl.float32)
        for d in range(0, D, b_D):
            at = p_query + o_q[:, None] * stride_q + (d + o_d)[None, :]
            q = tl.load(at, mask=m_q[:, None] & (d + o_d < D)[None, :], other=0.0).to(tl.float32)
            squares += q * q
        of_query = _inverse(tl.sum(squares, 1))
    for tile in range(0, part_size, b_N):
        first = i_p * part_size + tile
        o_n = first + o_r
        m_n = o_n < N
        p_rows = p_store + first.to(tl.int64) * stride_n
        scores = tl.zeros((b_Q, b_N), tl.float32)
        squares_n = tl.zeros((b_N,), tl.float32)
        for d in range(0, D, b_D):
            m_d = d + o_d < D
            at = p_rows + o_r[:, None] * stride_n + (d + o_d)[None, :]
            x = tl.load(at, mask=m_n[:, None] & m_d[None, :], other=0.0)
            at = p_query + o_q[:, None] * stride_q + (d + o_d)[None, :]
            q = tl.load(at, mask=m_q[:, None] & m_d[None, :], other=0.0)
            if b_Q == 1:
                scores += tl.sum(x.to(tl.float32) * q.to(tl.float32), 1)[None, :]
            else:
                scores = tl.dot(q, tl.trans(x), scores, input_precision="ieee")
            if not NORMALIZED and p_inverse is None:
                squares_n += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        if not NORMALIZED:
            if p_inverse is None:
                of_row = _inverse(squares_n)
            else:
                of_row = tl.load(p_inverse + o_n, mask=m_n, other=0.0)
            scores = scores * of_row[None, :] * of_query[:, None]
        # the order of floats as that of integers: the negative ones run backwards; −0 is 0
        bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = (ordered.to(tl.int64) << 32) | (4294967295 - o_n.to(tl.int64))[None, :]
        allowed = m_q[:, None] & m_n[None, :]
        if p_exclude is not None:
            at = p_exclude + (i_q * b_Q + o_q)[:, None] * stride_e + o_n[None, :]
            allowed = allowed & (tl.load(at, mask=allowed, other=1) == 0)
        best = _keep(best, tl.where(allowed, keys, NOTHING))
    o_k = tl.arange(0, b_K)
    at = p_key + ((i_q * b_Q + o_q)[:, None] * n_parts + i_p) * k + o_k[None, :]
    tl.store(at, best, mask=m_q[:, None] & (o_k < k)[None, :])


@triton.jit
def _join(p_key, p_score, p_index, k, n_keys, b_key: tl.constexpr, b_K: tl.constexpr):
    """The k best of the n_keys keys of query i_q, in order."""
    i_q = tl.program_id(0).to(tl.int64)
    best = _empty(1, b_K, k)
    for tile in range(0, n_keys, b_key):
        o_key = tile + tl.arange(0, b_key)
        keys = tl.load(p_key + i_q * n_keys + o_key, mask=o_key < n_keys, other=NOTHING)
        # places that a part left empty
        keys = tl.where(keys < NOTHING + 1 + b_K, NOTHING, keys)
        best = _keep(best, keys[None, :])
    o_k = tl.arange(0, b_K)
    best = tl.where((o_k < k)[None, :], best, NOTHING)
    for place in range(k):
        key = tl.max(tl.max(best, 1), 0)
        found = key >= NOTHING + 1 + b_K
        ordered = (key >> 32).to(tl.int32)
        score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
        tl.store(p_score + i_q * k + place, tl.where(found, score, float("-inf")))
        tl.store(p_index + i_q * k + place, tl.where(found, 4294967295 - (key & 4294967295), -1))
        best = tl.where(best == key, NOTHING, best)


def top_k(
    queries: Tensor,
    store: Tensor,
    k: int,
    *,
    normalized: bool = False,
    inverse_norms: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Neighbours:
    """``accel.kernels.similarity.top_k`` on a GPU."""
    (Q, D), N = queries.shape, len(store)
    queries, store = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, store))
    inverse_norms = None if inverse_norms is None else inverse_norms.contiguous()
    exclude = None if exclude is None else exclude.contiguous().view(torch.int8)
    scores = torch.empty(Q, k, dtype=torch.float32, device=store.device)
    indices = torch.empty(Q, k, dtype=torch.int64, device=store.device)
    if Q:
        t = tiles(Q, store.element_size(), normalized)
        b_K = _places(k)
        part_size = max(t.b_N, triton.cdiv(triton.cdiv(N, PARTS), t.b_N) * t.b_N)
        n_parts = triton.cdiv(N, part_size)
        keys = torch.empty(Q, n_parts, k, dtype=torch.int64, device=store.device)
        with torch.cuda.device_of(store):
            if N:
                _part[(triton.cdiv(Q, t.b_Q), n_parts)](
                    queries, store, inverse_norms, exclude, keys, queries.stride(0), store.stride(0),
                    N if exclude is not None and exclude.ndim == 2 else 0, Q, N, D, k, part_size, n_parts,
                    NORMALIZED=normalized, b_Q=t.b_Q, b_N=t.b_N, b_D=t.b_D, b_K=b_K, num_warps=t.num_warps,
                    num_stages=t.num_stages,
                )  # fmt: skip
            _join[(Q,)](keys, scores, indices, k, n_parts * k, b_key=KEYS, b_K=b_K, num_warps=4)
    return Neighbours(scores, indices)


def _places(k: int) -> int:
    return 8 if k <= 8 else 64


def builds() -> Iterator[Build]:
    """Every configuration that ``top_k`` launches."""
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for Q in (1, 16):
            for b_K in (8, 64):
                for variant in ("cosine", "normalized"):
                    yield _part_build(dtype, tiles(Q, size, variant == "normalized"), b_K, variant)
    for Q in (1, 16):
        for variant in ("inverse norms", "exclude"):
            yield _part_build("bf16", tiles(Q, 2, False), 8, variant)
    for b_K in (8, 64):
        types = {"p_key": "*i64", "p_score": "*fp32", "p_index": "*i64", "k": "i32", "n_keys": "i32"}
        yield Build("similarity", _join, f"k≤{b_K}", types, {"b_key": KEYS, "b_K": b_K})


def _part_build(dtype: str, t: Tiles, b_K: int, variant: str) -> Build:
    types = {
        "p_query": f"*{dtype}", "p_store": f"*{dtype}", "p_key": "*i64",
        **dict.fromkeys(("stride_q", "stride_n", "stride_e", "Q", "N", "D", "k", "part_size", "n_parts"), "i32"),
    }  # fmt: skip
    constants = {
        "NORMALIZED": variant == "normalized", "b_Q": t.b_Q, "b_N": t.b_N, "b_D": t.b_D, "b_K": b_K,
        "p_inverse": None, "p_exclude": None,
    }  # fmt: skip
    for name, type_, needed in (("p_inverse", "*fp32", "inverse norms"), ("p_exclude", "*i8", "exclude")):
        if variant == needed:
            del constants[name]
            types[name] = type_
    name = f"{dtype} {t.b_Q} queries k≤{b_K} {variant}"
    divisible = ("stride_q", "stride_n", "D", "part_size")
    return Build("similarity", _part, name, types, constants, divisible, t.num_warps, t.num_stages)
