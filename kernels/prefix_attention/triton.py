"""Triton kernels of the prefix_attention family: attention over one key set, split along it, and the merge of parts.

One kernel serves decode steps, prefills and shared segments: the queries that read the same keys (positions, heads of
a group, rows of a segment) are laid side by side in tiles, each program takes one tile and one part of the keys.
Equations, launches and numbers are in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from accel.kernels.ahead_of_time import Build
from accel.kernels.prefix_attention.reference import Plan, SharedKV

# programs that an H200 holds at once: on each of 132 processors, two of up to 255 registers a thread and 100 KiB
RESIDENT = 264
# what starting a program and what a merge cost, in tiles of keys read; measured on nothing, they only rank splits
START_TILES = 4
MERGE_TILES = 6
MAX_SPLITS = 128
LOG2E = tl.constexpr(1.4426950408889634)
# a distance that no two positions have
FAR = 1 << 30
# value columns a program merges
MERGED_DIM = 64


@triton.jit
def _tile(
    q, m, total, acc, p_k, p_v, p_bias, start, end, first, last, stride_kn, stride_vn, D, Dv, scale, cap,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """Take keys start … start + b_N into the running maximum, sum and result of every query (in powers of 2)."""
    o_n, o_d = tl.arange(0, b_N), tl.arange(0, b_D)
    # the scalar moves by 64 bits, so that the tile's own offsets fit in 32
    p_k = p_k + tl.cast(start, tl.int64) * stride_kn + (o_n[:, None] * stride_kn + o_d[None, :])
    p_v = p_v + tl.cast(start, tl.int64) * stride_vn + (o_n[:, None] * stride_vn + o_d[None, :])
    m_k, m_v = (o_d < D)[None, :], (o_d < Dv)[None, :]
    if MASKED:
        # a padded value times a weight of zero would still be NaN if it were one: it is not read
        m_k = m_k & (start + o_n < end)[:, None]
        m_v = m_v & (start + o_n < end)[:, None]
    k = tl.load(p_k, mask=m_k, other=0.0).to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        # cap · tanh(x), where the scale has made s = 2 x · log2(e)
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s)))
    if HAS_BIAS:
        bias = tl.load(p_bias + start + o_n, mask=start + o_n < end, other=0.0)
        s += (bias * LOG2E)[None, :]
    if MASKED:
        key = (start + o_n)[None, :]
        visible = (key >= first[:, None]) & (key <= last[:, None]) & (key < end)
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # a query that has seen nothing yet: -inf − -inf would be NaN
    shift = tl.where(m_new > float("-inf"), m_new, 0.0)
    p = tl.exp2(s - shift[:, None])
    rest = tl.exp2(m - shift)
    v = tl.load(p_v, mask=m_v, other=0.0).to(q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * rest[:, None], input_precision="ieee")
    return m_new, total * rest + tl.sum(p, 1), acc


@triton.jit(
    do_not_specialize=["n", "groups", "entries", "length", "window", "slack", "split_size", "n_splits", "first_part"]
)
def _attend(
    p_q, p_k, p_v, p_bias, p_out, p_part, p_lse, p_table,
    stride_qr, stride_qh, stride_qn, stride_kr, stride_kh, stride_kn, stride_vr, stride_vh, stride_vn,
    n, groups, entries, length, window, slack, split_size, n_splits, first_part, D, Dv, scale, cap,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, TWO_LOOPS: tl.constexpr,
    b_M: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """Query tile i_m of key head i_h over part i_s of key set i_r: the result itself or one part of it and its lse."""
    # the last tile sees the most keys: it starts first, the short ones fill up the end
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h, i_s = tl.program_id(1) // n_splits, tl.program_id(1) % n_splits
    i_r = tl.program_id(2).to(tl.int64)
    o_m, o_d = i_m * b_M + tl.arange(0, b_M), tl.arange(0, b_D)
    # a query's place in the tile: entry of the table, then position, then head of the group
    entry, o_i, head = o_m // (n * groups), o_m // groups % n, i_h * groups + o_m % groups
    m_m = entry < entries
    p_entry = p_table + (i_r + entry) * 2
    row = tl.load(p_entry, mask=m_m, other=0).to(tl.int64)
    position = tl.load(p_entry + 1, mask=m_m, other=0) + o_i
    # keys first … last are visible
    first = tl.maximum(position - window + 1, 0)
    last = tl.minimum(position + slack, length - 1)
    # all that any query of the tile sees, and this program's part of it
    lowest = tl.min(tl.where(m_m, first, length), 0) // b_N * b_N
    start = lowest + i_s * split_size
    end = tl.maximum(tl.minimum(start + split_size, tl.max(tl.where(m_m, last, -1), 0) + 1), start)
    p_row = p_q + row * stride_qr + head * stride_qh + o_i.to(tl.int64) * stride_qn
    q = tl.load(p_row[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_k += i_r * stride_kr + i_h.to(tl.int64) * stride_kh
    p_v += i_r * stride_vr + i_h.to(tl.int64) * stride_vh
    if HAS_BIAS:
        # only a segment has one, and it is a launch's only key set
        p_bias += i_h.to(tl.int64) * length
    m = tl.full((b_M,), float("-inf"), tl.float32)
    total = tl.zeros((b_M,), tl.float32)
    acc = tl.zeros((b_M, b_D), tl.float32)
    full_start, full_end = end, end
    if TWO_LOOPS:
        # tiles of which every query sees every key need no masks: full_start … full_end
        full_start = tl.max(tl.where(m_m, first, 0), 0) + b_N - 1
        full_start = tl.minimum(tl.maximum(full_start // b_N * b_N, start), end)
        full_end = (tl.min(tl.where(m_m, last, length - 1), 0) + 1) // b_N * b_N
        full_end = tl.minimum(tl.maximum(full_end, full_start), end)
        for i_n in range(full_start, full_end, b_N):
            m, total, acc = _tile(
                q, m, total, acc, p_k, p_v, p_bias, i_n, end, first, last, stride_kn, stride_vn, D, Dv, scale, cap,
                SOFTCAP, HAS_BIAS, False, b_N, b_D,
            )  # fmt: skip
    # the tiles on both sides of them, in one loop
    before = tl.cdiv(full_start - start, b_N)
    for i_n in range(before + tl.cdiv(end - full_end, b_N)):
        place = tl.where(i_n < before, start + i_n * b_N, full_end + (i_n - before) * b_N)
        m, total, acc = _tile(
            q, m, total, acc, p_k, p_v, p_bias, place, end, first, last, stride_kn, stride_vn, D, Dv, scale, cap,
            SOFTCAP, HAS_BIAS, True, b_N, b_D,
        )  # fmt: skip
    # worked out again: kept through the loops, they cost registers that the tiles need
    o_m = i_m * b_M + tl.arange(0, b_M)
    m_m, o_i, head = o_m < entries * n * groups, o_m // groups % n, i_h * groups + o_m % groups
    seen = total > 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    # addresses are a scalar and small offsets: a 64-bit one for every element would not fit in the registers
    kv_heads = tl.num_programs(1) // n_splits
    if first_part < 0:
        # one row's queries are the tile, and there is nothing to merge
        p_out += i_r * n * kv_heads * groups * Dv
        place = (o_i * kv_heads * groups + head) * Dv
        m_out = m_m[:, None] & (o_d < Dv)[None, :]
        tl.store(p_out + (place[:, None] + o_d[None, :]), acc.to(p_out.dtype.element_ty), mask=m_out)
    else:
        # parts stand as they were tiled, _merge finds them; where a query sees nothing, lse is -inf
        tile = ((i_r * kv_heads + i_h) * n_splits + i_s) * tl.num_programs(0) + i_m
        part = first_part + tile * b_M
        o_m = tl.arange(0, b_M)
        lse = tl.where(seen, m + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(p_lse + part + o_m, lse, mask=m_m)
        tl.store(p_part + part * b_D + (o_m[:, None] * b_D + o_d[None, :]), acc, mask=m_m[:, None])


@triton.jit(do_not_specialize=["queries", "n", "groups", "kv_heads", "n_parts"])
def _merge(
    p_part, p_lse, p_count, p_place, p_out, queries, n, groups, kv_heads, n_parts, Dv, stride_part,
    b_Q: tl.constexpr, b_P: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """out = Σ 2^(lse_p − lse) out_p of queries i_q, columns i_d, over the parts that the query's row has."""
    i_q, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_q, o_p, o_d = i_q * b_Q + tl.arange(0, b_Q), tl.arange(0, b_P), i_d * b_D + tl.arange(0, b_D)
    m_q = o_q < queries
    heads = kv_heads * groups
    row, o_i, head = o_q // (n * heads), o_q // heads % n, o_q % heads
    inner = o_i * groups + head % groups
    count = tl.load(p_count + row, mask=m_q, other=0)
    m = tl.full((b_Q,), float("-inf"), tl.float32)
    total = tl.zeros((b_Q,), tl.float32)
    acc = tl.zeros((b_Q, b_D), tl.float32)
    for i_p in range(0, tl.max(count, 0), b_P):
        inside = (i_p + o_p)[None, :] < count[:, None]
        p_here = p_place + (row[:, None] * n_parts + (i_p + o_p)[None, :]) * 2
        place = tl.load(p_here, mask=inside, other=0).to(tl.int64) + inner[:, None]
        place += (head // groups)[:, None] * tl.load(p_here + 1, mask=inside, other=0)
        lse = tl.load(p_lse + place, mask=inside, other=float("-inf"))
        part = tl.load(
            p_part + place[:, :, None] * stride_part + o_d[None, None, :],
            mask=inside[:, :, None] & (o_d < Dv)[None, None, :], other=0.0,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse, 1))
        # parts in which a query sees nothing: -inf − -inf would be NaN
        shift = tl.where(m_new > float("-inf"), m_new, 0.0)
        weight = tl.exp2(lse - shift[:, None])
        rest = tl.exp2(m - shift)
        acc = acc * rest[:, None] + tl.sum(weight[:, :, None] * part, 1)
        total = total * rest + tl.sum(weight, 1)
        m = m_new
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    m_out = m_q[:, None] & (o_d < Dv)[None, :]
    tl.store(p_out + o_q[:, None] * Dv + o_d[None, :], acc.to(p_out.dtype.element_ty), mask=m_out)


@dataclass(frozen=True)
class Tiles:
    """How ``_attend`` is compiled: queries and keys of a tile, padded head size, whether full tiles go unmasked."""

    b_M: int
    b_N: int
    b_D: int
    two_loops: bool
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, D: int, queries: int, biased: bool = False) -> Tiles:
    """The configuration for head size ``D`` (the larger of keys' and values') and so many queries on one key set.

    A few queries wait for memory, and the mask is free: one loop, so that no tile of keys is read unprefetched.
    With a bias, a thread also holds its number for each of the keys: with as many keys and queries a tile it would
    spill (gfx942; fp32 on sm_80).
    """
    b_D = max(64, triton.next_power_of_2(D))
    if dtype == torch.float32:
        # no tensor cores
        return Tiles(16 if biased or b_D > 64 else 32, 16 if b_D == 256 else 32, b_D, True, 8, 2)
    if queries <= 16:
        return Tiles(16, 8192 // b_D, b_D, False, 4, 3)
    if b_D == 256:
        return Tiles(64, 16 if biased else 32, b_D, True, 8, 2)
    b_N = 32 if biased else 64
    return Tiles(64, b_N, b_D, True, 4, 2) if queries <= 64 else Tiles(128, b_N, b_D, True, 8, 2)


@lru_cache(1024)
def splits(programs: int, n_tiles: int) -> int:
    """Into how many parts ``n_tiles`` tiles of keys are split for each of so many programs: the cheapest number.

    Rounds of resident programs, each as long as its tiles and its start, and a merge where there is one.
    """

    def cost(parts: int) -> int:
        rounds = -(-programs * parts // RESIDENT)
        return rounds * (-(-n_tiles // parts) + START_TILES) + (MERGE_TILES if parts > 1 else 0)

    if programs >= 4 * RESIDENT:
        # the last round leaves little idle, and a long prefill's parts would take much memory
        return 1
    return min(range(1, max(1, min(n_tiles, MAX_SPLITS)) + 1), key=cost)


@dataclass(frozen=True)
class Launch:
    """Key sets of one length, each read by so many rows (``entries``), how they are tiled, split and stored.

    ``first_part``: where its parts begin among all; -1: it writes the result itself.
    """

    entries: int
    key_sets: int
    tiles: Tiles
    n_tiles: int
    n_splits: int
    split_size: int
    first_part: int


@dataclass(frozen=True)
class Schedule:
    """All launches of a step, in every layer with the same heads; the tail's comes first.

    ``tables`` int32 [key sets · entries, 2] of each: row, position of its first query from key 0.
    ``count`` int32 [R]: parts of a row. ``places`` int32 [R, n_parts, 2]: where a part begins, and from head to head.
    ``n_queries``: of all parts together, padded; 0 where the tail is the whole result.
    """

    launches: tuple[Launch, ...]
    tables: tuple[Tensor, ...]
    count: Tensor
    places: Tensor
    n_parts: int
    n_queries: int


def _schedule(
    plan: Plan, dtype: torch.dtype, D: int, H: int, Hkv: int, segments: Sequence[SharedKV], keys_per_split: int | None
) -> Schedule:
    """Sizes and rows are known on the host: nothing is asked of the device, one copy goes to it."""
    R, queries_of_row = len(plan.starts), plan.n * (H // Hkv)
    # (rows, position of the first query from key 0, key sets, length, whether it has a bias)
    key_sets: list[tuple[Sequence[int], Sequence[int], int, int, bool]] = [
        (range(R), plan.starts, R, plan.tail_length, False)
    ]
    for s in segments:
        distance = tuple(plan.first_query_positions[r] - s.first_position for r in s.rows)
        key_sets.append((s.rows, distance, 1, s.keys.shape[1], s.bias is not None))
    numbers: list[int] = []
    places: list[list[tuple[int, int]]] = [[] for _ in range(R)]
    made: list[Launch] = []
    tables: list[slice] = []
    n_queries = 0
    for index, (readers, distances, sets, length, biased) in enumerate(key_sets):
        entries = len(readers) // sets
        t = tiles(dtype, D, entries * queries_of_row, biased)
        n_tiles = triton.cdiv(entries * queries_of_row, t.b_M)
        span = length
        if plan.window is not None and index == 0:
            # positions in one tile of queries, and keys that rounding down to a whole tile adds
            span = min(length, plan.window + t.b_M * Hkv // H + 1 + t.b_N)
        keys = keys_per_split or triton.cdiv(span, splits(n_tiles * Hkv * sets, triton.cdiv(span, t.b_N)))
        split_size = triton.cdiv(keys, t.b_N) * t.b_N
        n_splits = triton.cdiv(span, split_size)
        padded = n_tiles * t.b_M
        made.append(Launch(entries, sets, t, n_tiles, n_splits, split_size, n_queries))
        tables.append(slice(len(numbers), len(numbers) + 2 * len(readers)))
        for i, row in enumerate(readers):
            i_r, entry = divmod(i, entries)
            first = n_queries + i_r * Hkv * n_splits * padded + entry * queries_of_row
            places[row] += [(first + part * padded, n_splits * padded) for part in range(n_splits)]
        n_queries += sets * Hkv * n_splits * padded
        numbers += [number for pair in zip(readers, distances, strict=True) for number in pair]
        # tables begin at multiples of 16 bytes, as the kernel was compiled for
        numbers += [0] * (-len(numbers) % 4)
    n_parts = max(map(len, places))
    at = len(numbers)
    numbers += [number for row in places for pair in (*row, *[(0, 0)] * (n_parts - len(row))) for number in pair]
    numbers += [0] * (-len(numbers) % 4)
    end = len(numbers)
    numbers += map(len, places)
    # pinned, so that the copy does not wait for the device
    table = torch.tensor(numbers, dtype=torch.int32, pin_memory=plan.device.type == "cuda")
    table = table.to(plan.device, non_blocking=True)
    direct = n_parts == 1 and len(made) == 1
    if direct:
        made, n_queries = [replace(made[0], first_part=-1)], 0
    return Schedule(tuple(made), tuple(table[t] for t in tables), table[end:], table[at:end], n_parts, n_queries)


def prefix_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    segments: Sequence[SharedKV] = (),
    *,
    scale: float,
    softcap: float | None = None,
    keys_per_split: int | None = None,
) -> Tensor:
    """``accel.kernels.prefix_attention`` on a GPU. ``keys_per_split`` splits key sets by hand, for tests."""
    R, H, n, D = query.shape
    Hkv, Dv, dtype = keys.shape[1], values.shape[3], query.dtype
    segments = [s for s in segments if s.rows and s.keys.shape[1]]
    if plan.causal and not segments and softcap is None and _sdpa_is_flash(query, keys, values):
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=Hkv != H)
    sizes = tuple((s.rows, s.first_position, s.keys.shape[1], s.bias is not None) for s in segments)
    of = (dtype, D, Dv, H, Hkv, sizes, keys_per_split)
    if of not in plan.derived:
        plan.derived[of] = _schedule(plan, dtype, max(D, Dv), H, Hkv, segments, keys_per_split)
    schedule: Schedule = plan.derived[of]

    # [R, n, H, Dv] in memory: what the output projection reads
    out = torch.empty(R, n, H, Dv, dtype=dtype, device=query.device)
    b_D = schedule.launches[0].tiles.b_D
    part = torch.empty(max(1, schedule.n_queries * b_D), dtype=torch.float32, device=query.device)
    lse = torch.empty(max(1, schedule.n_queries), dtype=torch.float32, device=query.device)
    query = query if query.stride(3) == 1 else query.contiguous()
    window = FAR if plan.window is None else min(plan.window, FAR)
    factor, cap = scale * math.log2(math.e), 0.0
    if softcap is not None:
        factor, cap = 2 * factor / softcap, softcap * math.log2(math.e)

    def attend(launch: Launch, table: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slack: int) -> None:
        """k [key sets, Hkv, length, D], v [key sets, Hkv, length, Dv], bias [Hkv, length]."""
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        bias = None if bias is None else bias.contiguous()
        t = launch.tiles
        _attend[(launch.n_tiles, Hkv * launch.n_splits, launch.key_sets)](
            query, k, v, bias, out, part, lse, table, *query.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            n, H // Hkv, launch.entries, k.shape[2], window, slack, launch.split_size, launch.n_splits,
            launch.first_part, D, Dv, factor, cap,
            SOFTCAP=softcap is not None, HAS_BIAS=bias is not None, TWO_LOOPS=t.two_loops,
            b_M=t.b_M, b_N=t.b_N, b_D=t.b_D, num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip

    with torch.cuda.device_of(query):
        attend(schedule.launches[0], schedule.tables[0], keys, values, None, 0)
        for launch, table, s in zip(schedule.launches[1:], schedule.tables[1:], segments, strict=True):
            # a segment ends before its readers' queries: nothing in it is hidden but by the window
            attend(launch, table, s.keys[None], s.values[None], s.bias, FAR)
        if schedule.n_queries:
            b_Q, b_P = merged(schedule.n_parts)
            queries = R * n * H
            _merge[(triton.cdiv(queries, b_Q), triton.cdiv(Dv, MERGED_DIM))](
                part, lse, schedule.count, schedule.places, out, queries, n, H // Hkv, Hkv, schedule.n_parts, Dv, b_D,
                b_Q=b_Q, b_P=b_P, b_D=MERGED_DIM, num_warps=4,
            )  # fmt: skip
    return out.transpose(1, 2)


def merged(n_parts: int) -> tuple[int, int]:
    """Queries and parts that a program merges at a time: many queries of a prefill, many parts of a decode step."""
    return (8, 4) if n_parts <= 4 else (1, 32)


def _sdpa_is_flash(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch's fused kernels take the shape; they are hard to beat at a plain causal prefill."""
    D = query.shape[3]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape[3] == values.shape[3] and D % 8 == 0 and keys.dtype == values.dtype == query.dtype


def builds() -> Iterator[Build]:
    """Every configuration that the function above launches."""
    integers = (
        "stride_qr", "stride_qh", "stride_qn", "stride_kr", "stride_kh", "stride_kn", "stride_vr", "stride_vh",
        "stride_vn", "n", "groups", "entries", "length", "window", "slack", "split_size", "n_splits", "first_part", "D",
        "Dv",
    )  # fmt: skip
    divisible = [name for name in integers if name.startswith(("stride", "D"))]
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for dtype, name in names.items():
        types = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{name}") | dict.fromkeys(integers, "i32")
        types |= {"p_part": "*fp32", "p_lse": "*fp32", "p_table": "*i32", "scale": "fp32", "cap": "fp32"}
        for biased in (False, True):
            sizes = product((64, 128, 256), (16, 64, 128))
            chosen = dict.fromkeys(tiles(dtype, D, queries, biased) for D, queries in sizes)
            for t, softcap in product(chosen, (False, True)):
                constants = {
                    "SOFTCAP": softcap, "HAS_BIAS": biased, "TWO_LOOPS": t.two_loops,
                    "b_M": t.b_M, "b_N": t.b_N, "b_D": t.b_D,
                }  # fmt: skip
                yield Build(
                    "prefix_attention", _attend,
                    f"{name}, {t.b_M} queries, D {t.b_D}{', softcap' * softcap}{', bias' * biased}",
                    types | ({"p_bias": "*fp32"} if biased else {}), constants | ({} if biased else {"p_bias": None}),
                    divisible=divisible, num_warps=t.num_warps, num_stages=t.num_stages,
                )  # fmt: skip
        types = {
            "p_part": "*fp32", "p_lse": "*fp32", "p_count": "*i32", "p_place": "*i32", "p_out": f"*{name}",
            "queries": "i32", "n": "i32", "groups": "i32", "kv_heads": "i32", "n_parts": "i32", "Dv": "i32",
            "stride_part": "i32",
        }  # fmt: skip
        for b_Q, b_P in dict.fromkeys(merged(parts) for parts in (2, 100)):
            constants = {"b_Q": b_Q, "b_P": b_P, "b_D": MERGED_DIM}
            yield Build(
                "prefix_attention", _merge, f"{name}, {b_Q} × {b_P} parts", types, constants,
                divisible=["Dv", "stride_part"], num_warps=4,
            )  # fmt: skip
