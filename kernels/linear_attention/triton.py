"""Triton kernels of normalised gated linear attention: prefill, one-token step, replay of buffered tokens.

Prefill walks chunks of tokens with the state in registers; nothing but inputs and outputs touches memory. Where the
batch is too small to fill the GPU, a sequence is cut into segments, whose states are found first. README.md has the
equations and what bounds the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.linear_attention.reference import Replay, State

# log decays are natural, exponentials are taken to base 2
LOG2E = tl.constexpr(1.4426950408889634)
# Products of fp32 numbers, as six of their bf16 parts on tensor cores: as exact as fp32, and without the registers
# that products outside tensor cores take (they spilled). Operands in bf16 are not affected. The interpreter multiplies
# in fp32 and knows no other name for it.
PRECISION = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")
# The steepest log decay at which a chunk of 32 is one product: its gates, counted from half of the chunk's decay,
# reach 2^(16 · 4.5 · log2 e) = 2^104, which leaves fp32 and bf16 room for the numbers they multiply.
STEEPEST = -4.5
# tokens a segment has at least, and programs a processor gets before sequences are cut
SEGMENT_TOKENS = 512
PROGRAMS_A_PROCESSOR = 2
# how a sequence's rows are found: [B, T], packed, or a buffer's rows followed by T new ones
BATCH, PACKED, REPLAY = 0, 1, 2
# Triton's names of the types that inputs may have
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# numbers that a compiled kernel must serve whatever they are: Triton would compile anew for every 1 among them
ANY = [
    "T", "size", "room", "n_sequences", "n_segments", "n_rows", "capacity", "H", "Hk", "Hv", "Hg", "k_group", "v_group",
    "g_group", "layout", "has_initial", "keeps_state", "normalize",
]  # fmt: skip


@triton.jit
def _rows(p_rows, i_n, T, layout):
    """Sequence i_n is rows begin..end of its inputs; its queries (and outputs) begin `skip` rows later."""
    first = tl.load(p_rows + i_n, mask=layout > 0, other=0)
    after = tl.load(p_rows + i_n + 1, mask=layout == 1, other=0)
    begin = tl.where(layout == 1, first, 0)
    skip = tl.where(layout == 2, first, 0)
    end = tl.where(layout == 1, after, T + skip)
    return begin, end, skip


@triton.jit
def _operand(x, like):
    """x as a product's operand: fp32 stays (products are then exact), else bf16, whose range holds gated numbers."""
    return x if like.dtype.element_ty == tl.float32 else x.to(tl.bfloat16)


@triton.jit
def _slab(
    p_q, p_k, p_g, q_t, k_t, g_t, o_k, K, n_rows, n_unasked, v, pairs, num, den, s, z, scale, min_log_decay,
    BOUNDED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What keys o_k of one chunk add to its pairs [C, C], numerators and denominators, and to their rows of the state.

    Pairs are [query, key] where bounded and [key, query] elsewhere. Slabs of keys keep few numbers in registers.
    """
    o_c, m_k = tl.arange(0, C), o_k < K
    m_ck = (o_c < n_rows)[:, None] & m_k[None, :]
    m_q = m_ck & (o_c >= n_unasked)[:, None]
    q = tl.load(p_q + o_c[:, None] * q_t + o_k[None, :], mask=m_q, other=0.0).to(tl.float32) * scale
    k = tl.load(p_k + o_c[:, None] * k_t + o_k[None, :], mask=m_ck, other=0.0).to(tl.float32)
    g = tl.load(p_g + o_c[:, None] * g_t + o_k[None, :], mask=m_ck, other=0.0)
    g = tl.maximum(g, min_log_decay) * LOG2E
    run = tl.cumsum(g, 0)
    whole = tl.sum(g, 0)
    if BOUNDED:
        # gates counted from half of the chunk's decay: neither side of a pair leaves the floating-point range
        half = whole * 0.5
        q *= tl.exp2(run - half[None, :])
        k *= tl.exp2(half[None, :] - run)
        rest = tl.exp2(half)
        s *= rest[:, None]
        z *= rest
    else:
        # Row j of k is decayed up to row i, a step at a time: no quotient, no difference of large sums. After the
        # last row it is what the state takes.
        for i in range(C):
            m_g = o_k < tl.where(i < n_rows, K, 0)
            m_qi = o_k < tl.where((i < n_rows) & (i >= n_unasked), K, 0)
            g_i = tl.load(p_g + i * g_t + o_k, mask=m_g, other=0.0)
            q_i = tl.load(p_q + i * q_t + o_k, mask=m_qi, other=0.0).to(tl.float32) * scale
            a_i = tl.exp2(tl.maximum(g_i, min_log_decay) * LOG2E)
            k = tl.where(o_c[:, None] < i, k * a_i[None, :], k)
            weight = tl.where(o_c <= i, tl.sum(k * q_i[None, :], 1), 0.0)
            pairs += tl.where(o_c[None, :] == i, weight[:, None], 0.0)
        q *= tl.exp2(run)
        rest = tl.exp2(whole)
    num = tl.dot(_operand(q, p_q), _operand(s, p_q), num, input_precision=PRECISION)
    den += tl.sum(q * z[None, :], 1)
    if BOUNDED:
        pairs = tl.dot(_operand(q, p_q), tl.trans(_operand(k, p_k)), pairs, input_precision=PRECISION)
        s = tl.dot(tl.trans(_operand(k, p_k)), v, s, input_precision=PRECISION) * rest[:, None]
        z = (z + tl.sum(k, 0)) * rest
    else:
        s = tl.dot(tl.trans(_operand(k, p_k)), v, s * rest[:, None], input_precision=PRECISION)
        z = z * rest + tl.sum(k, 0)
    return pairs, num, den, s, z


@triton.jit
def _load_state(p_s, p_z, o_k, o_v, K, V, wanted):
    m_k = o_k < tl.where(wanted != 0, K, 0)
    s = tl.load(p_s + o_k[:, None] * V + o_v[None, :], mask=m_k[:, None] & (o_v < V)[None, :], other=0.0)
    return s, tl.load(p_z + o_k, mask=m_k, other=0.0)


@triton.jit
def _store_state(p_s, p_z, o_k, o_v, K, V, s, z):
    m_k = o_k < K
    tl.store(p_s + o_k[:, None] * V + o_v[None, :], s, mask=m_k[:, None] & (o_v < V)[None, :])
    # one tile of values writes z
    if tl.min(o_v, 0) == 0:
        tl.store(p_z + o_k, z, mask=m_k)


@triton.jit(do_not_specialize=ANY)
def _outputs(
    p_q, p_k, p_v, p_g, p_out, p_den, p_s, p_z, p_s_end, p_z_end, p_rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, out_b, den_b,
    T, size, n_sequences, H, k_group, v_group, g_group, K, V, scale, eps, min_log_decay,
    layout, has_initial, keeps_state, normalize,
    BOUNDED: tl.constexpr, C: tl.constexpr, SLABS: tl.constexpr, b_K: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """Outputs of segment i_s of sequence i_n, head i_h and the values of tile i_v, from the state before it."""
    n_tiles = tl.cdiv(V, b_V)
    i_h, i_v = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    i_s, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end, skip = _rows(p_rows, i_n, T, layout)
    begin += i_s * size
    if (i_s > 0) & (begin >= end):
        return
    last = begin + size >= end
    end = tl.minimum(end, begin + size)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, b_K), i_v * b_V + tl.arange(0, b_V)
    row = begin.to(tl.int64)
    p_q += i_n * q_b + (row - skip) * q_t + i_h * q_h
    p_k += i_n * k_b + row * k_t + (i_h // k_group) * k_h
    p_v += i_n * v_b + row * v_t + (i_h // v_group) * v_h
    p_g += i_n * g_b + row * g_t + (i_h // g_group) * g_h
    p_out += i_n * out_b + ((row - skip) * H + i_h) * V
    p_den += i_n * den_b + (row - skip) * H + i_h
    at_state = (i_s * n_sequences + i_n) * H + i_h
    p_s += at_state * K * V
    p_z += at_state * K
    s0, z0 = _load_state(p_s, p_z, o_k, o_v, K, V, has_initial)
    if SLABS > 1:
        s1, z1 = _load_state(p_s, p_z, o_k + b_K, o_v, K, V, has_initial)
    if SLABS > 2:
        s2, z2 = _load_state(p_s, p_z, o_k + 2 * b_K, o_v, K, V, has_initial)
        s3, z3 = _load_state(p_s, p_z, o_k + 3 * b_K, o_v, K, V, has_initial)

    # addresses computed before the loop would stay in registers that it needs
    for t in tl.range(begin, end, C, disable_licm=True):
        n, unasked = end - t, skip - t
        m_v = (o_c < n)[:, None] & (o_v < V)[None, :]
        v = _operand(tl.load(p_v + o_c[:, None] * v_t + o_v[None, :], mask=m_v, other=0.0), p_v)
        pairs = tl.zeros((C, C), tl.float32)
        num = tl.zeros((C, b_V), tl.float32)
        den = tl.zeros((C,), tl.float32)
        pairs, num, den, s0, z0 = _slab(
            p_q, p_k, p_g, q_t, k_t, g_t, o_k, K, n, unasked, v, pairs, num, den, s0, z0, scale, min_log_decay,
            BOUNDED, C,
        )  # fmt: skip
        if SLABS > 1:
            pairs, num, den, s1, z1 = _slab(
                p_q, p_k, p_g, q_t, k_t, g_t, o_k + b_K, K, n, unasked, v, pairs, num, den, s1, z1, scale,
                min_log_decay, BOUNDED, C,
            )  # fmt: skip
        if SLABS > 2:
            pairs, num, den, s2, z2 = _slab(
                p_q, p_k, p_g, q_t, k_t, g_t, o_k + 2 * b_K, K, n, unasked, v, pairs, num, den, s2, z2, scale,
                min_log_decay, BOUNDED, C,
            )  # fmt: skip
            pairs, num, den, s3, z3 = _slab(
                p_q, p_k, p_g, q_t, k_t, g_t, o_k + 3 * b_K, K, n, unasked, v, pairs, num, den, s3, z3, scale,
                min_log_decay, BOUNDED, C,
            )  # fmt: skip
        if BOUNDED:
            pairs = tl.where(o_c[:, None] >= o_c[None, :], pairs, 0.0)
        else:
            pairs = tl.trans(pairs)
        den += tl.sum(pairs, 1)
        num = tl.dot(_operand(pairs, p_q), v, num, input_precision=PRECISION)
        out = (num / tl.where(normalize != 0, den + eps, 1.0)[:, None]).to(p_out.dtype.element_ty)
        asked = (o_c < n) & (o_c >= unasked)
        tl.store(p_out + o_c[:, None] * (H * V) + o_v[None, :], out, mask=asked[:, None] & (o_v < V)[None, :])
        if (normalize == 0) & (i_v == 0):
            tl.store(p_den + o_c * H, den, mask=asked)
        p_q += C * q_t
        p_k += C * k_t
        p_v += C * v_t
        p_g += C * g_t
        p_out += C * H * V
        p_den += C * H

    if last & (keeps_state != 0):
        p_s_end += (i_n * H + i_h) * K * V
        p_z_end += (i_n * H + i_h) * K
        _store_state(p_s_end, p_z_end, o_k, o_v, K, V, s0, z0)
        if SLABS > 1:
            _store_state(p_s_end, p_z_end, o_k + b_K, o_v, K, V, s1, z1)
        if SLABS > 2:
            _store_state(p_s_end, p_z_end, o_k + 2 * b_K, o_v, K, V, s2, z2)
            _store_state(p_s_end, p_z_end, o_k + 3 * b_K, o_v, K, V, s3, z3)


@triton.jit(do_not_specialize=ANY)
def _states(
    p_k, p_v, p_g, p_s, p_z, p_s_end, p_z_end, p_decay, p_rows,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    T, size, room, n_sequences, H, k_group, v_group, g_group, K, V, min_log_decay, layout, has_initial,
    C: tl.constexpr, b_K: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """What segment i_s adds to a state and how it decays one, if more than `size - room` rows of it are there."""
    n_tiles, n_slabs = tl.cdiv(V, b_V), tl.cdiv(K, b_K)
    i_v, i_k = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles % n_slabs
    i_h = tl.program_id(0) // n_tiles // n_slabs
    i_s, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end, _ = _rows(p_rows, i_n, T, layout)
    begin += i_s * size
    if end - begin <= size - room:
        return
    end = tl.minimum(end, begin + size)

    o_c = tl.arange(0, C)
    o_k, o_v = i_k * b_K + tl.arange(0, b_K), i_v * b_V + tl.arange(0, b_V)
    m_k, m_v = o_k < K, o_v < V
    row = begin.to(tl.int64)
    p_k += i_n * k_b + row * k_t + (i_h // k_group) * k_h
    p_v += i_n * v_b + row * v_t + (i_h // v_group) * v_h
    p_g += i_n * g_b + row * g_t + (i_h // g_group) * g_h
    at_state = (i_s * n_sequences + i_n) * H + i_h
    s, z = _load_state(p_s + at_state * K * V, p_z + at_state * K, o_k, o_v, K, V, has_initial)
    decay = tl.zeros((b_K,), tl.float32)

    for t in range(begin, end, C):
        inside = t + o_c < end
        m_ck, m_cv = inside[:, None] & m_k[None, :], inside[:, None] & m_v[None, :]
        # the row after: a token is decayed by those that follow it in its chunk, summed from the chunk's end
        m_next = m_ck & (t + o_c + 1 < end)[:, None] & (o_c + 1 < C)[:, None]
        k = tl.load(p_k + o_c[:, None] * k_t + o_k[None, :], mask=m_ck, other=0.0)
        v = tl.load(p_v + o_c[:, None] * v_t + o_v[None, :], mask=m_cv, other=0.0)
        g = tl.load(p_g + (o_c + 1)[:, None] * g_t + o_k[None, :], mask=m_next, other=0.0)
        g_first = tl.load(p_g + o_k, mask=m_k, other=0.0)
        g = tl.maximum(g, min_log_decay) * LOG2E
        g_first = tl.maximum(g_first, min_log_decay) * LOG2E
        k_gated = k.to(tl.float32) * tl.exp2(tl.cumsum(g, 0, reverse=True))
        whole = g_first + tl.sum(g, 0)
        rest = tl.exp2(whole)
        s = tl.dot(tl.trans(_operand(k_gated, p_k)), _operand(v, p_v), s * rest[:, None], input_precision=PRECISION)
        z = z * rest + tl.sum(k_gated, 0)
        decay += whole
        p_k += C * k_t
        p_v += C * v_t
        p_g += C * g_t

    _store_state(p_s_end + at_state * K * V, p_z_end + at_state * K, o_k, o_v, K, V, s, z)
    if (i_v == 0) & (room == 0):
        tl.store(p_decay + at_state * K + o_k, decay, mask=m_k)


@triton.jit(do_not_specialize=ANY)
def _prefixes(
    p_s, p_z, p_decay, p_s_initial, p_z_initial, p_rows, T, size, n_sequences, n_segments, H, K, V, layout, has_initial,
    b_K: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """Slot 0 becomes the initial state, slot i what segments 0..i-1 make of it (their own states are in slots 1..i)."""
    i_h, i_n = (tl.program_id(0) % H), (tl.program_id(0) // H).to(tl.int64)
    o_k = tl.program_id(1) * b_K + tl.arange(0, b_K)
    o_v = tl.program_id(2) * b_V + tl.arange(0, b_V)
    m_k = o_k < K
    m_s = m_k[:, None] & (o_v < V)[None, :]
    m_z = o_k < tl.where(tl.program_id(2) == 0, K, 0)
    begin, end, _ = _rows(p_rows, i_n, T, layout)
    at_state = i_n * H + i_h
    o_s = o_k[:, None] * V + o_v[None, :]
    s = tl.zeros((b_K, b_V), tl.float32)
    z = tl.zeros((b_K,), tl.float32)
    if has_initial != 0:
        s = tl.load(p_s_initial + at_state * K * V + o_s, mask=m_s, other=0.0)
        z = tl.load(p_z_initial + at_state * K + o_k, mask=m_z, other=0.0)
    tl.store(p_s + at_state * K * V + o_s, s, mask=m_s)
    tl.store(p_z + at_state * K + o_k, z, mask=m_z)
    for _i in range(1, tl.minimum(n_segments, tl.cdiv(end - begin, size))):
        decay = tl.exp2(tl.load(p_decay + at_state * K + o_k, mask=m_k, other=0.0))
        at_state += n_sequences * H
        s = decay[:, None] * s + tl.load(p_s + at_state * K * V + o_s, mask=m_s, other=0.0)
        z = decay * z + tl.load(p_z + at_state * K + o_k, mask=m_z, other=0.0)
        tl.store(p_s + at_state * K * V + o_s, s, mask=m_s)
        tl.store(p_z + at_state * K + o_k, z, mask=m_z)


@triton.jit(do_not_specialize=ANY)
def _step(
    p_q, p_k, p_v, p_g, p_out, p_s, p_z, q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h,
    H, k_group, v_group, g_group, K, V, scale, eps, min_log_decay, b_K: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """One token of row i_b, head i_h. One program has all values of a head: z has one reader, which is its writer."""
    i_h, i_b = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    o_k, m_k = tl.arange(0, b_K), tl.arange(0, b_K) < K
    p_s += (i_b * H + i_h) * K * V
    p_z += (i_b * H + i_h) * K
    q = tl.load(p_q + i_b * q_b + i_h * q_h + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    k = tl.load(p_k + i_b * k_b + (i_h // k_group) * k_h + o_k, mask=m_k, other=0.0).to(tl.float32)
    g = tl.load(p_g + i_b * g_b + (i_h // g_group) * g_h + o_k, mask=m_k, other=0.0)
    z = tl.load(p_z + o_k, mask=m_k, other=0.0)
    a = tl.exp2(tl.maximum(g, min_log_decay) * LOG2E)
    z = a * z + k
    den = tl.sum(q * z, 0) + eps
    for start in range(0, V, b_V):
        o_v = start + tl.arange(0, b_V)
        o_s = o_k[:, None] * V + o_v[None, :]
        m_s = m_k[:, None] & (o_v < V)[None, :]
        s = tl.load(p_s + o_s, mask=m_s, other=0.0)
        v = tl.load(p_v + i_b * v_b + (i_h // v_group) * v_h + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        s = a[:, None] * s + k[:, None] * v[None, :]
        tl.store(p_s + o_s, s, mask=m_s)
        out = tl.sum(q[:, None] * s, 0) / den
        tl.store(p_out + (i_b * H + i_h) * V + o_v, out.to(p_out.dtype.element_ty), mask=o_v < V)
    tl.store(p_z + o_k, z, mask=m_k)


@triton.jit(do_not_specialize=ANY)
def _append(
    p_k, p_v, p_g, p_k_buffer, p_v_buffer, p_g_buffer, p_length, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    n_rows, capacity, Hk, Hv, Hg, K, V, min_log_decay, b_D: tl.constexpr,
):  # fmt: skip
    """Copy position i_t of row i_b behind the row's buffered inputs; a row that had no room was folded: it is empty."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(p_length + i_b)
    # what is stored is the same if it is read again: programs of one row need no order
    length = tl.where(length > capacity - n_rows, 0, length)
    tl.store(p_length + i_b, length)
    row = i_b * capacity + length + i_t
    o_d = tl.arange(0, b_D)
    for start in range(0, Hk * K, b_D):
        o = start + o_d
        x = tl.load(p_k + i_b * k_b + i_t * k_t + (o // K) * k_h + o % K, mask=o < Hk * K)
        tl.store(p_k_buffer + row * Hk * K + o, x, mask=o < Hk * K)
    for start in range(0, Hv * V, b_D):
        o = start + o_d
        x = tl.load(p_v + i_b * v_b + i_t * v_t + (o // V) * v_h + o % V, mask=o < Hv * V)
        tl.store(p_v_buffer + row * Hv * V + o, x, mask=o < Hv * V)
    for start in range(0, Hg * K, b_D):
        o = start + o_d
        x = tl.load(p_g + i_b * g_b + i_t * g_t + (o // K) * g_h + o % K, mask=o < Hg * K)
        tl.store(p_g_buffer + row * Hg * K + o, tl.maximum(x, min_log_decay), mask=o < Hg * K)


class Tiles(NamedTuple):
    """How a chunked kernel is launched: tokens a chunk, keys a slab, values a program, warps, pipeline stages."""

    C: int
    b_K: int
    b_V: int
    num_warps: int
    num_stages: int


# keys and values of one program that joins segments, and what one program of _append copies at a time
JOINED = (16, 64)
COPIED = 1024


def _output_tiles(slabs: int, kind: str, bounded: bool, short: bool) -> Tiles:
    """Tiles of ``_outputs`` for up to 64, 128 or 256 keys (1, 2 or 4 slabs): as much as registers hold."""
    if kind == "fp32":
        return Tiles(16, 64, 16 if slabs == 4 else 32, 8, 1)
    if slabs == 4:
        return Tiles(16, 64, 32 if bounded else 64, 8, 1)
    if bounded and not short:
        # AMD's compiler holds what a second stage loads in registers, where fp16's conversions leave no room
        return Tiles(32, 64, 64, 8, 1 if kind == "fp16" and slabs == 2 else 2)
    return Tiles(16, 64, 64, 4, 2)


def _state_tiles(kind: str) -> Tiles:
    """Tiles of ``_states``, whose programs have one slab of keys each."""
    return Tiles(16, 64, 64, 8, 1) if kind == "fp32" else Tiles(64, 64, 64, 8, 2)


def _slabs(K: int) -> int:
    return 1 if K <= 64 else 2 if K <= 128 else 4


def _step_tiles(K: int) -> tuple[int, int, int]:
    """Keys, values at a time and warps of ``_step``: a tile of the state takes 64 registers of a thread at most."""
    b_K = max(64, triton.next_power_of_2(K))
    return b_K, 128 if b_K <= 128 else 64, 8


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-10,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float | None = None,
    segments: int | None = None,
) -> tuple[Tensor, State]:
    """``accel.kernels.linear_attention`` on a GPU. ``segments``: see ``_prefill``."""
    out, _, state = _prefill(q, k, v, log_decay, scale, eps, initial_state, cu_seqlens, min_log_decay, True, segments)
    return out, state


def linear_attention_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, State]:
    """``accel.kernels.linear_attention_terms`` on a GPU."""
    return _prefill(q, k, v, log_decay, scale, 0.0, initial_state, cu_seqlens, min_log_decay, False, segments)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    eps: float,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    min_log_decay: float | None,
    normalize: bool,
    segments: int | None,
) -> tuple[Tensor, Tensor, State]:
    """Outputs (numerators where not normalised), denominators (only where not normalised) and the state after.

    ``segments``: how many parts a sequence is cut into at most; None: as many as fill the GPU.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    packed = cu_seqlens is not None
    N = len(cu_seqlens) - 1 if cu_seqlens is not None else B
    q, k, v, g = (_with_rows(x) for x in (q, k, v, log_decay.float()))
    out = q.new_empty(B, T, H, V)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    den = torch.empty(*((1, 1, 1) if normalize else (B, T, H)), **fp32)
    after = State(torch.empty(N, H, K, V, **fp32), torch.empty(N, H, K, **fp32))
    if not N * H:
        return out, den, after
    # pointers that a flag keeps from being read point at something all the same
    rows, layout = (cu_seqlens.int(), PACKED) if cu_seqlens is not None else (after.z.view(torch.int32), BATCH)
    before, has_initial = (initial_state, 1) if initial_state is not None else (after, 0)
    slabs, kind = _slabs(K), KINDS[q.dtype]
    bounded = _is_bounded(min_log_decay, slabs, kind)
    tiles = _output_tiles(slabs, kind, bounded, T <= 16)
    floor = -float("inf") if min_log_decay is None else min_log_decay
    if segments is None:
        segments = _fill(N * H * triton.cdiv(V, tiles.b_V), T, q.device)
    size = max(1, triton.cdiv(T, segments * 64)) * 64
    segments = max(1, triton.cdiv(T, size))
    with torch.cuda.device_of(q):
        if segments > 1:
            slots = State(torch.empty(segments, N, H, K, V, **fp32), torch.empty(segments, N, H, K, **fp32))
            decay = torch.empty_like(slots.z)
            ends = State(slots.s[1:], slots.z[1:])
            _find_states(k, v, g, after, ends, decay, rows, T, size, 0, segments - 1, packed, layout, 0, floor)
            b_K, b_V = JOINED
            _prefixes[(N * H, triton.cdiv(K, b_K), triton.cdiv(V, b_V))](
                *slots, decay, *before, rows, T, size, N, segments, H, K, V, layout, has_initial,
                b_K=b_K, b_V=b_V, num_warps=4,
            )  # fmt: skip
            before, has_initial = slots, 1
        _outputs[(H * triton.cdiv(V, tiles.b_V), segments, N)](
            q, k, v, g, out, den, *before, *after, rows,
            *_strides(q, packed), *_strides(k, packed), *_strides(v, packed), *_strides(g, packed),
            0 if packed else T * H * V, 0 if packed else T * H, T, size, N, H, *_groups(H, k, v, g), K, V,
            K**-0.5 if scale is None else scale, eps, floor, layout, has_initial, 1, int(normalize),
            BOUNDED=bounded, SLABS=slabs, **tiles._asdict(),
        )  # fmt: skip
    return out, den, after


def _find_states(
    k: Tensor, v: Tensor, g: Tensor, before: State, after: State, decay: Tensor, rows: Tensor,
    T: int, size: int, room: int, segments: int, packed: bool, layout: int, has_initial: int, floor: float,
) -> None:  # fmt: skip
    N, H, K, V = after.s.shape[-4:]
    tiles = _state_tiles(KINDS[k.dtype])
    grid = (H * triton.cdiv(K, tiles.b_K) * triton.cdiv(V, tiles.b_V), segments, N)
    _states[grid](
        k, v, g, *before, *after, decay, rows, *_strides(k, packed), *_strides(v, packed), *_strides(g, packed),
        T, size, room, N, H, *_groups(H, k, v, g), K, V, floor, layout, has_initial, **tiles._asdict(),
    )  # fmt: skip


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    *,
    scale: float | None = None,
    eps: float = 1e-10,
    min_log_decay: float | None = None,
) -> Tensor:
    """``accel.kernels.linear_attention_step`` on a GPU."""
    (B, H, K), V = q.shape, v.shape[-1]
    q, k, v, g = (_with_rows(x) for x in (q, k, v, log_decay.float()))
    out = q.new_empty(B, H, V)
    if B * H:
        b_K, b_V, num_warps = _step_tiles(K)
        with torch.cuda.device_of(q):
            _step[(B * H,)](
                q, k, v, g, out, *state, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride()[:2],
                H, *(H // x.shape[1] for x in (k, v, g)), K, V, K**-0.5 if scale is None else scale, eps,
                -float("inf") if min_log_decay is None else min_log_decay, b_K=b_K, b_V=b_V, num_warps=num_warps,
            )  # fmt: skip
    return out


def replay_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    replay: Replay,
    *,
    scale: float | None = None,
    eps: float = 1e-10,
    min_log_decay: float | None = None,
) -> Tensor:
    """``accel.kernels.linear_attention.replay_step`` on a GPU: three launches, no value is brought to the host."""
    return _replay(q, k, v, log_decay, state, replay, scale, eps, min_log_decay, normalize=True)[0]


def replay_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    replay: Replay,
    *,
    scale: float | None = None,
    min_log_decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``accel.kernels.linear_attention.replay_terms`` on a GPU."""
    return _replay(q, k, v, log_decay, state, replay, scale, 0.0, min_log_decay, normalize=False)


def _replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    replay: Replay,
    scale: float | None,
    eps: float,
    min_log_decay: float | None,
    *,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (numerators where not normalised) and denominators (only where not normalised)."""
    (B, n, H, K), V = q.shape, v.shape[-1]
    q, k, v, g = (_with_rows(x) for x in (q, k, v, log_decay.float()))
    out = q.new_empty(B, n, H, V)
    # a pointer that a flag keeps from being written points at something all the same
    den = state.z if normalize else torch.empty(B, n, H, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, den
    floor = -float("inf") if min_log_decay is None else min_log_decay
    slabs, kind = _slabs(K), KINDS[q.dtype]
    bounded = _is_bounded(min_log_decay, slabs, kind)
    tiles = _output_tiles(slabs, kind, bounded, n <= 16)
    buffers = (replay.k, replay.v, replay.log_decay)
    with torch.cuda.device_of(q):
        _fold(state, replay, n)
        _append[(n, B)](
            k, v, g, *buffers, replay.length, *k.stride()[:3], *v.stride()[:3], *g.stride()[:3],
            n, replay.capacity, k.shape[2], v.shape[2], g.shape[2], K, V, floor, b_D=COPIED, num_warps=4,
        )  # fmt: skip
        _outputs[(H * triton.cdiv(V, tiles.b_V), 1, B)](
            q, *buffers, out, den, *state, *state, replay.length,
            *_strides(q, False), *(stride for x in buffers for stride in _strides(x, False)), n * H * V, n * H,
            n, replay.capacity, B, H, *_groups(H, *buffers), K, V, K**-0.5 if scale is None else scale, eps, floor,
            REPLAY, 1, 0, int(normalize), BOUNDED=bounded, SLABS=slabs, **tiles._asdict(),
        )  # fmt: skip
    return out, den


def fold(state: State, replay: Replay, *, room: int | None = None) -> None:
    """``accel.kernels.linear_attention.fold`` on a GPU."""
    room = replay.capacity if room is None else room
    if state.s.numel():
        with torch.cuda.device_of(state.s):
            _fold(state, replay, room)
    replay.length.mul_(replay.length <= replay.capacity - room)


def _fold(state: State, replay: Replay, room: int) -> None:
    """The states of rows without room for ``room`` more; their lengths are left for the caller to clear."""
    buffers = (replay.k, replay.v, replay.log_decay)
    _find_states(
        *buffers, state, state, state.z, replay.length, 0, replay.capacity, room, 1, False, REPLAY, 1, -float("inf")
    )


def _is_bounded(min_log_decay: float | None, slabs: int, kind: str) -> bool:
    """Whether chunks are one product; 256 keys in fp32 would not fit into registers then."""
    return min_log_decay is not None and min_log_decay >= STEEPEST and (kind != "fp32" or slabs < 4)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    return (0 if packed else x.stride(0), x.stride(1), x.stride(2))


def _groups(H: int, *inputs: Tensor) -> tuple[int, ...]:
    return tuple(H // x.shape[2] for x in inputs)


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H200's number under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _fill(programs: int, T: int, device: torch.device) -> int:
    """Segments that fill the GPU, each long enough to be worth finding its state twice."""
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * _processors(device), programs)
    return max(1, min(wanted, T // SEGMENT_TOKENS))


def builds() -> Iterator[Build]:
    """Every configuration that the functions above launch."""
    for kind in KINDS.values():
        for slabs in (1, 2, 4):
            # where no chunk is longer than 16, short sequences take the same kernel as long ones
            for bounded, short in ((True, False), (True, True), (False, True)):
                tiles = _output_tiles(slabs, kind, bounded, short)
                if bounded and not _is_bounded(STEEPEST, slabs, kind):
                    continue
                if bounded and not short and tiles == _output_tiles(slabs, kind, bounded, True):
                    continue
                name = f"{kind} K ≤ {64 * slabs} {'bounded' if bounded else 'any decay'}, chunks of {tiles.C}"
                yield _build(_outputs, name, kind, BOUNDED=bounded, SLABS=slabs, **tiles._asdict())
            b_K, b_V, num_warps = _step_tiles(64 * slabs)
            yield _build(_step, f"{kind} K ≤ {b_K}", kind, b_K=b_K, b_V=b_V, num_warps=num_warps)
        yield _build(_states, kind, kind, **_state_tiles(kind)._asdict())
        yield _build(_append, kind, kind, b_D=COPIED)
    yield _build(_prefixes, "fp32", "fp32", b_K=JOINED[0], b_V=JOINED[1])


def _build(kernel: Any, name: str, dtype: str, num_warps: int = 4, num_stages: int = 3, **constants: int) -> Build:
    data = {"p_q", "p_k", "p_v", "p_out", "p_k_buffer", "p_v_buffer"}
    types, divisible = {}, []
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.startswith("p_"):
            types[argument] = (
                "*i32" if argument in ("p_rows", "p_length") else f"*{dtype if argument in data else 'fp32'}"
            )
        elif argument in ("scale", "eps", "min_log_decay"):
            types[argument] = "fp32"
        else:
            types[argument] = "i32"
            if argument not in ANY:
                divisible.append(argument)
    return Build(
        "linear_attention", kernel, name, types, constants, divisible, num_warps=num_warps, num_stages=num_stages
    )
