"""Triton kernels of the conv_features family: features of a stretch of tokens, the conv's new state, and one step.

A program takes one head's tokens from the projections to the features: the conv in fp32 on shifted reads of the same
lines, one matrix product with the head's map, both softmaxes, two writes. Nothing in between touches memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.conv_features.reference import ConvState, Features

# a program of the step takes the fewest rows of the batch that a matrix product takes, and few channels at a time: it
# has all their reads under way at once
STEP_ROWS = 16
# heads that the step is compiled for, and the features that go with them, padded
SIZES = {64: 32, 128: 64, 256: 128}
# channels of the longest head
STATE_CHANNELS = 256


class Tiles(NamedTuple):
    """Tokens and channels that a program reads at a time, features, padded, and warps."""

    b_T: int
    b_D: int
    b_f: int
    num_warps: int


def tiles(f: int, element_size: int) -> Tiles:
    """The tiles for f features: the number of tokens has no say in them, so neither has it in a sum's order."""
    # what registers hold without spilling, on every target: in fp32 the operands of the product lie there too
    if f > 64:
        return Tiles(32, 32, 128, 8)
    b_f = 32 if f <= 32 else 64
    return Tiles(64, 32, b_f, 8) if element_size == 4 else Tiles(64, 64, b_f, 8 if f <= 32 else 4)


class StepTiles(NamedTuple):
    """Channels that the step reads at a time, how often, and features, padded."""

    b_D: int
    n_D: int
    b_f: int


def step_tiles(D: int, f: int, element_size: int) -> StepTiles:
    """The tiles of the step for heads of D channels and f features."""
    size, b_f = next((size, b_f) for size, b_f in SIZES.items() if size >= D and b_f >= f)
    b_D = 16 if element_size == 4 and size == 256 else 32
    return StepTiles(b_D, size // b_D, b_f)


@triton.jit
def _shifted(p_x, p_mask, first, o_r, m_t, start, lag, stride_t, o_d, m_d):
    """The inputs ``lag`` tokens ago [b_T, b_D] in fp32: zero before the sequence's start and at padding."""
    here = m_t & (first + o_r - lag >= start)
    if p_mask is not None:
        here = here & (tl.load(p_mask + first + o_r - lag, mask=here, other=0) != 0)
    at = p_x + (o_r - lag)[:, None] * stride_t + o_d[None, :]
    return tl.load(at, mask=here[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def _phi(scores, o_f, f):
    """scores [rows, b_f] → softmax(scores) and softmax(−scores) over the first f columns, at least the floor."""
    inside = (o_f < f)[None, :]
    up = tl.where(inside, scores, float("-inf"))
    e_up = tl.exp(up - tl.max(up, 1)[:, None])
    down = tl.where(inside, -scores, float("-inf"))
    e_down = tl.exp(down - tl.max(down, 1)[:, None])
    p_up = e_up * (1.0 / tl.sum(e_up, 1))[:, None]
    p_down = e_down * (1.0 / tl.sum(e_down, 1))[:, None]
    return tl.maximum(p_up, 1e-12), tl.maximum(p_down, 1e-12)


@triton.jit
def _log_decay(x, normalizer, least):
    """max(logsigmoid(x) / normalizer, least), to full precision where e^−|x| is far below 1 (log1p after Kahan)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum((tl.minimum(x, 0.0) - log1p) / normalizer, least)


@triton.jit
def _features(
    p_q, p_k, p_gate, p_q_taps, p_k_taps, p_q_map, p_k_map, p_q_state, p_k_state, p_mask, p_starts, p_q_out, p_k_out,
    p_decay, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh,
    T, H, G, D, f, W, n_sequences, halvings, normalizer, least,
    SILU: tl.constexpr, b_T: tl.constexpr, b_D: tl.constexpr, b_f: tl.constexpr,
):  # fmt: skip
    """Tokens i_t of row i_b: query features of head i_x, or key features of head i_x − H and its group's gate."""
    i_t, i_x, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_k = i_x >= H
    i_h = i_x % H
    i_source = tl.where(is_k, i_h // G, i_h).to(tl.int64)
    n_source = tl.where(is_k, H // G, H)
    stride_t = tl.where(is_k, stride_kt, stride_qt)
    # 64 bits for where a tile begins, 32 within it
    o_r = tl.arange(0, b_T)
    first = i_t * b_T
    row = i_b * T + first
    p_x = tl.where(is_k, p_k, p_q) + i_b * tl.where(is_k, stride_kb, stride_qb) + first.to(tl.int64) * stride_t
    p_x += i_source * tl.where(is_k, stride_kh, stride_qh)
    p_map = tl.where(is_k, p_k_map, p_q_map) + i_h.to(tl.int64) * D * f
    o_t = first + o_r
    m_t = o_t < T
    o_f = tl.arange(0, b_f)
    p_pad = p_mask
    if p_mask is not None:
        p_pad = p_mask + i_b * T
    sequence = tl.zeros((b_T,), tl.int32) + tl.program_id(2)
    start = tl.zeros((b_T,), tl.int32)
    if p_starts is not None:
        # the last sequence that starts at or before a token, by halving; of several, the one that is not empty
        sequence = tl.zeros((b_T,), tl.int32)
        above = sequence + n_sequences
        for _ in range(halvings):
            middle = (sequence + above) // 2
            begun = tl.load(p_starts + middle).to(tl.int32) <= o_t
            sequence = tl.where(begun, middle, sequence)
            above = tl.where(begun, above, middle)
        start = tl.load(p_starts + sequence).to(tl.int32)
    scores = tl.zeros((b_T, b_f), tl.float32)
    for i_d in range(0, D, b_D):
        o_d = i_d + tl.arange(0, b_D)
        m_d = o_d < D
        if p_q_taps is None:
            z = _shifted(p_x, p_pad, first, o_r, m_t, start, 0, stride_t, o_d, m_d)
        else:
            p_taps = tl.where(is_k, p_k_taps, p_q_taps) + (i_h.to(tl.int64) * D + o_d) * W
            z = tl.zeros((b_T, b_D), tl.float32)
            # not unrolled: the lines of the first read are still in the cache, and four tiles would fill the registers
            for lag in range(W):
                tap = tl.load(p_taps + (W - 1 - lag), mask=m_d, other=0.0)
                z += tap[None, :] * _shifted(p_x, p_pad, first, o_r, m_t, start, lag, stride_t, o_d, m_d)
            # tokens near a sequence's start also see what came before it
            if p_q_state is not None and tl.min(tl.where(m_t, o_t - start, W)) < W - 1:
                p_state = tl.where(is_k, p_k_state, p_q_state)
                for lag in range(1, W):
                    old_tap = tl.load(p_taps + (W - 1 - lag), mask=m_d, other=0.0)
                    before = m_t & (o_t - lag < start)
                    slot = sequence.to(tl.int64) * (W - 1) + (o_t - lag - start + W - 1)
                    p_old = p_state + (slot * n_source + i_source)[:, None] * D + o_d[None, :]
                    old = tl.load(p_old, mask=before[:, None] & m_d[None, :], other=0.0)
                    z += old_tap[None, :] * old.to(tl.float32)
        if SILU:
            z = z * tl.sigmoid(z)
        weights = tl.load(p_map + o_d[:, None] * f + o_f[None, :], mask=m_d[:, None] & (o_f < f)[None, :], other=0.0)
        scores = tl.dot(z.to(weights.dtype), weights, scores, input_precision="ieee")
    up, down = _phi(scores, o_f, f)
    if p_mask is not None:
        keep = (tl.load(p_pad + o_t, mask=m_t, other=0) != 0) | (i_x < H)
        up, down = tl.where(keep[:, None], up, 0.0), tl.where(keep[:, None], down, 0.0)
    at = tl.where(is_k, p_k_out, p_q_out) + (row * H + i_h) * (2 * f) + (o_r * H)[:, None] * (2 * f) + o_f[None, :]
    inside = m_t[:, None] & (o_f < f)[None, :]
    tl.store(at, up.to(p_q_out.dtype.element_ty), mask=inside)
    tl.store(at + f, down.to(p_q_out.dtype.element_ty), mask=inside)
    if p_gate is not None and is_k & (i_h % G == 0):
        o_g = tl.arange(0, 2 * b_f)
        m_g = m_t[:, None] & (o_g < 2 * f)[None, :]
        p_logits = p_gate + i_b * stride_gb + i_source * stride_gh + first.to(tl.int64) * stride_gt
        p_logits += o_r[:, None] * stride_gt + o_g[None, :]
        decay = _log_decay(tl.load(p_logits, mask=m_g, other=0.0).to(tl.float32), normalizer, least)
        if p_mask is not None:
            decay = tl.where((tl.load(p_pad + o_t, mask=m_t, other=0) != 0)[:, None], decay, 0.0)
        p_log = p_decay + (row * n_source + i_source) * (2 * f) + (o_r * n_source)[:, None] * (2 * f) + o_g[None, :]
        tl.store(p_log, decay.to(p_decay.dtype.element_ty), mask=m_g)


@triton.jit
def _next_state(
    p_q, p_k, p_q_state, p_k_state, p_mask, p_starts, p_q_next, p_k_next,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, T, H, Hkv, D, W: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """The last W−1 inputs of query head i_x, or of key head i_x − H, at the end of sequence i_n."""
    i_x, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_k = i_x >= H
    i_source = tl.where(is_k, i_x - H, i_x).to(tl.int64)
    n_source = tl.where(is_k, Hkv, H)
    stride_t = tl.where(is_k, stride_kt, stride_qt)
    p_x = tl.where(is_k, p_k, p_q) + i_source * tl.where(is_k, stride_kh, stride_qh)
    o_d = tl.arange(0, b_D)
    m_d = o_d < D
    start, end = i_n * 0, i_n * 0 + T
    if p_starts is not None:
        start, end = tl.load(p_starts + i_n).to(tl.int64), tl.load(p_starts + i_n + 1).to(tl.int64)
    else:
        p_x += i_n * tl.where(is_k, stride_kb, stride_qb)
    for slot in tl.static_range(W - 1):
        # the same token for all channels: a vector, as masks are
        token = tl.zeros((b_D,), tl.int64) + (end - (W - 1) + slot)
        read = m_d & (token >= start)
        if p_mask is not None:
            p_pad = p_mask + token
            if p_starts is None:
                p_pad += i_n * T
            read = read & (tl.load(p_pad, mask=read, other=0) != 0)
        x = tl.load(p_x + token * stride_t + o_d, mask=read, other=0.0)
        if p_q_state is not None:
            # a piece shorter than the memory: part of the old memory stays
            left = token - start + W - 1
            p_old = tl.where(is_k, p_k_state, p_q_state)
            at = p_old + ((i_n * (W - 1) + left) * n_source + i_source) * D + o_d
            x = tl.where(token < start, tl.load(at, mask=m_d & (token < start), other=0.0), x)
        p_next = tl.where(is_k, p_k_next, p_q_next)
        tl.store(p_next + ((i_n * (W - 1) + slot) * n_source + i_source) * D + o_d, x, mask=m_d)


@triton.jit
def _step(
    p_q, p_k, p_gate, p_q_taps, p_k_taps, p_q_map, p_k_map, p_q_state, p_k_state, p_q_out, p_k_out, p_decay,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_gb, stride_gh, B, H, G, D, f, normalizer, least,
    W: tl.constexpr, SILU: tl.constexpr, b_B: tl.constexpr, b_D: tl.constexpr, n_D: tl.constexpr, b_f: tl.constexpr,
):  # fmt: skip
    """Rows i_b: query head i_x; or key head i_x − H, all its group's heads, which share the state that ends here."""
    i_b, i_x = tl.program_id(0), tl.program_id(1)
    is_k = i_x >= H
    i_source = tl.where(is_k, i_x - H, i_x).to(tl.int64)
    n_source = tl.where(is_k, H // G, H)
    n_heads = tl.where(is_k, G, 1)
    o_b = i_b.to(tl.int64) * b_B + tl.arange(0, b_B)
    m_b = o_b < B
    o_f = tl.arange(0, b_f)
    stride_b = tl.where(is_k, stride_kb, stride_qb)
    p_x = tl.where(is_k, p_k, p_q) + i_source * tl.where(is_k, stride_kh, stride_qh) + o_b[:, None] * stride_b
    # slot s of the state is n_source * D further on than slot s − 1
    p_state = tl.where(is_k, p_k_state, p_q_state) + (o_b * (W - 1) * n_source + i_source)[:, None] * D
    for i_g in range(n_heads):
        i_h = i_source * n_heads + i_g
        p_map = tl.where(is_k, p_k_map, p_q_map) + i_h * D * f
        scores = tl.zeros((b_B, b_f), tl.float32)
        for i_d in tl.static_range(n_D):
            o_d = i_d * b_D + tl.arange(0, b_D)
            inside = m_b[:, None] & (o_d < D)[None, :]
            p_taps = tl.where(is_k, p_k_taps, p_q_taps) + (i_h * D + o_d) * W
            tap = tl.load(p_taps + (W - 1), mask=o_d < D, other=0.0)
            z = tap[None, :] * tl.load(p_x + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
            for slot in tl.static_range(W - 1):
                tap = tl.load(p_taps + slot, mask=o_d < D, other=0.0)
                x = tl.load(p_state + slot * n_source * D + o_d[None, :], mask=inside, other=0.0)
                z += tap[None, :] * x.to(tl.float32)
            if SILU:
                z = z * tl.sigmoid(z)
            weights = tl.load(
                p_map + o_d[:, None] * f + o_f[None, :], mask=(o_d < D)[:, None] & (o_f < f)[None, :], other=0.0
            )
            scores = tl.dot(z.to(weights.dtype), weights, scores, input_precision="ieee")
        up, down = _phi(scores, o_f, f)
        at = tl.where(is_k, p_k_out, p_q_out) + (o_b * H + i_h)[:, None] * (2 * f) + o_f[None, :]
        inside = m_b[:, None] & (o_f < f)[None, :]
        tl.store(at, up.to(p_q_out.dtype.element_ty), mask=inside)
        tl.store(at + f, down.to(p_q_out.dtype.element_ty), mask=inside)
    # every thread of the program has read the old state
    tl.debug_barrier()
    for i_d in tl.static_range(n_D):
        o_d = i_d * b_D + tl.arange(0, b_D)
        inside = m_b[:, None] & (o_d < D)[None, :]
        for slot in tl.static_range(W - 1):
            at = p_state + slot * n_source * D + o_d[None, :]
            if slot < W - 2:
                x = tl.load(at + n_source * D, mask=inside, other=0.0)
            else:
                x = tl.load(p_x + o_d[None, :], mask=inside, other=0.0)
            tl.store(at, x, mask=inside)
    if p_gate is not None and is_k:
        o_g = tl.arange(0, 2 * b_f)
        m_g = m_b[:, None] & (o_g < 2 * f)[None, :]
        p_logits = p_gate + o_b[:, None] * stride_gb + i_source * stride_gh + o_g[None, :]
        decay = _log_decay(tl.load(p_logits, mask=m_g, other=0.0).to(tl.float32), normalizer, least)
        row = o_b * n_source + i_source
        tl.store(p_decay + row[:, None] * (2 * f) + o_g[None, :], decay.to(p_decay.dtype.element_ty), mask=m_g)


def conv_features(
    q: Tensor,
    k: Tensor,
    gate: Tensor | None = None,
    *,
    q_map: Tensor,
    k_map: Tensor,
    q_taps: Tensor | None = None,
    k_taps: Tensor | None = None,
    activation: str | None = None,
    gate_normalizer: float = 16.0,
    min_log_decay: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ConvState | None = None,
) -> Features:
    """``accel.kernels.conv_features.conv_features`` on a GPU: one launch for the features, one for the state."""
    (B, T, H, D), Hkv, f = q.shape, k.shape[2], q_map.shape[-1]
    q, k = _rows(q), _rows(k)
    gate = None if gate is None else _rows(gate)
    mask = None if mask is None else mask.contiguous().view(torch.int8)
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    N = B if starts is None else len(starts) - 1
    old_q, old_k = (None, None) if state is None else (state.q.contiguous(), state.k.contiguous())
    q_out, k_out = (torch.empty(B, T, H, 2 * f, dtype=q.dtype, device=q.device) for _ in range(2))
    decay = None if gate is None else torch.empty(B, T, Hkv, 2 * f, dtype=q.dtype, device=q.device)
    W = 0 if q_taps is None else q_taps.shape[-1]
    new = None
    with torch.cuda.device_of(q):
        if q_out.numel():
            t = tiles(f, q.element_size())
            _features[(triton.cdiv(T, t.b_T), 2 * H, B)](
                q, k, gate, _fp32(q_taps), _fp32(k_taps), *_maps(q, q_map, k_map), old_q, old_k, mask, starts,
                q_out, k_out, decay, *q.stride()[:3], *k.stride()[:3], *_strides(gate, 3),
                T, H, H // Hkv, D, f, W, N, max(N - 1, 0).bit_length(), float(gate_normalizer), _least(min_log_decay),
                SILU=activation == "silu", b_T=t.b_T, b_D=t.b_D, b_f=t.b_f, num_warps=t.num_warps, num_stages=1,
            )  # fmt: skip
        if W:
            new = ConvState(q.new_empty(N, W - 1, H, D), k.new_empty(N, W - 1, Hkv, D))
            if N and H:
                _next_state[(H + Hkv, N)](
                    q, k, old_q, old_k, mask, starts, new.q, new.k, *q.stride()[:3], *k.stride()[:3], T, H, Hkv, D,
                    W=W, b_D=STATE_CHANNELS, num_warps=1,
                )  # fmt: skip
    return Features(q_out, k_out, decay, new)


def conv_features_step(
    q: Tensor,
    k: Tensor,
    gate: Tensor | None = None,
    *,
    q_map: Tensor,
    k_map: Tensor,
    q_taps: Tensor,
    k_taps: Tensor,
    state: ConvState,
    activation: str | None = None,
    gate_normalizer: float = 16.0,
    min_log_decay: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``accel.kernels.conv_features.conv_features_step`` on a GPU: one launch, the state written where it is."""
    (B, H, D), Hkv, f = q.shape, k.shape[1], q_map.shape[-1]
    q, k = _rows(q), _rows(k)
    gate = None if gate is None else _rows(gate)
    q_out, k_out = (torch.empty(B, H, 2 * f, dtype=q.dtype, device=q.device) for _ in range(2))
    decay = None if gate is None else torch.empty(B, Hkv, 2 * f, dtype=q.dtype, device=q.device)
    t = step_tiles(D, f, q.element_size())
    if q_out.numel():
        with torch.cuda.device_of(q):
            _step[(triton.cdiv(B, STEP_ROWS), H + Hkv)](
                q, k, gate, _fp32(q_taps), _fp32(k_taps), *_maps(q, q_map, k_map), state.q, state.k, q_out, k_out,
                decay, *q.stride()[:2], *k.stride()[:2], *_strides(gate, 2),
                B, H, H // Hkv, D, f, float(gate_normalizer), _least(min_log_decay),
                W=q_taps.shape[-1], SILU=activation == "silu", b_B=STEP_ROWS, b_D=t.b_D, n_D=t.n_D, b_f=t.b_f,
                num_warps=8, num_stages=1,
            )  # fmt: skip
    return q_out, k_out, decay


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fp32(taps: Tensor | None) -> Tensor | None:
    return None if taps is None else taps.to(torch.float32).contiguous()


def _maps(q: Tensor, *maps: Tensor) -> list[Tensor]:
    return [m.to(q.dtype).contiguous() for m in maps]


def _strides(x: Tensor | None, n: int) -> tuple[int, ...]:
    return (0,) * n if x is None else x.stride()[:n]


def _least(min_log_decay: float | None) -> float:
    return float("-inf") if min_log_decay is None else float(min_log_decay)


def builds() -> Iterator[Build]:
    """Every configuration that the functions above launch; LoLCATs' in one half precision stands for the other's."""
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for D, f in SIZES.items():
            for variant in ("lawcat", "resumed, packed, padded, silu", "lolcats")[: 2 if dtype == "fp16" else 3]:
                yield _features_build(dtype, D, tiles(f, size), variant)
            for silu in (False, True):
                yield _step_build(dtype, D, step_tiles(D, f, size), silu)
        yield _state_build(dtype)


def _features_build(dtype: str, D: int, t: Tiles, variant: str) -> Build:
    pointers = dict.fromkeys(("p_q", "p_k", "p_q_map", "p_k_map", "p_q_out", "p_k_out"), f"*{dtype}")
    strides = [f"stride_{x}{axis}" for x in "qkg" for axis in "bth"]
    numbers = dict.fromkeys([*strides, "T", "H", "G", "D", "f", "W", "n_sequences", "halvings"], "i32")
    constants: dict[str, int | None] = {"SILU": False, "b_T": t.b_T, "b_D": t.b_D, "b_f": t.b_f}
    optional = {
        "p_gate": f"*{dtype}", "p_decay": f"*{dtype}", "p_q_taps": "*fp32", "p_k_taps": "*fp32",
        "p_q_state": f"*{dtype}", "p_k_state": f"*{dtype}", "p_mask": "*i8", "p_starts": "*i32",
    }  # fmt: skip
    if variant == "lolcats":
        optional = {}
    elif variant == "lawcat":
        optional = dict(list(optional.items())[:4])
    else:
        constants["SILU"] = True
    absent = ("p_gate", "p_decay", "p_q_taps", "p_k_taps", "p_q_state", "p_k_state", "p_mask", "p_starts")
    types = {**pointers, **optional, **numbers, "normalizer": "fp32", "least": "fp32"}
    constants |= {n: None for n in absent if n not in optional}
    name = f"{dtype} D={D} {variant}"
    divisible = [*strides, "D", "f"]
    return Build("conv_features", _features, name, types, constants, divisible, t.num_warps, num_stages=1)


def _step_build(dtype: str, D: int, t: StepTiles, silu: bool) -> Build:
    pointers = (
        "p_q", "p_k", "p_gate", "p_q_map", "p_k_map", "p_q_state", "p_k_state", "p_q_out", "p_k_out", "p_decay",
    )  # fmt: skip
    strides = [f"stride_{x}{axis}" for x in "qkg" for axis in "bh"]
    types = {
        **dict.fromkeys(pointers, f"*{dtype}"), "p_q_taps": "*fp32", "p_k_taps": "*fp32",
        **dict.fromkeys([*strides, "B", "H", "G", "D", "f"], "i32"), "normalizer": "fp32", "least": "fp32",
    }  # fmt: skip
    constants = {"W": 4, "SILU": silu, "b_B": STEP_ROWS, "b_D": t.b_D, "n_D": t.n_D, "b_f": t.b_f}
    name, divisible = f"{dtype} D={D}{' silu' if silu else ''}", [*strides, "D", "f"]
    return Build("conv_features", _step, name, types, constants, divisible, num_warps=8, num_stages=1)


def _state_build(dtype: str) -> Build:
    pointers = ("p_q", "p_k", "p_q_state", "p_k_state", "p_q_next", "p_k_next")
    strides = [f"stride_{x}{axis}" for x in "qk" for axis in "bth"]
    types = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys([*strides, "T", "H", "Hkv", "D"], "i32")}
    constants = {"p_mask": None, "p_starts": None, "W": 4, "b_D": STATE_CHANNELS}
    return Build("conv_features", _next_state, dtype, types, constants, [*strides, "D"], num_warps=1)
