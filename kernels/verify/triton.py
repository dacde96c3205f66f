"""Triton kernels of the verify family: normalisers, the verdict of each row, one draw; nothing touches the host.

A position's vocabulary is split over several programs, by a rule that looks at V alone, so that sums are added in the
same order whatever else is in the batch. Every position is read once for its normaliser, and the one that the next
token comes from once more (block rule: sampled positions once more too, for the mass that q leaves uncovered).
Equations and numbers are in README.md. Lengths are brought to 0..K and ids outside the vocabulary have probability 0,
because nobody looked at the values before: nothing outside the tensors is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.verify.reference import Lenience, Verdict

# parts of one position's vocabulary at most, and positions of a row decided at a time
PARTS = 64
POSITIONS = 16
# logits of a part for a normaliser and those read at a time, and weights summed or walked through at a time
PART = 8192
LOGITS = 4096
WEIGHTS = 2048
# how the draft's probabilities are given
NO_Q, PROBABILITIES, SCORES = 0, 1, 2

# 2^(x · LOG2_E / t) = e^(x / t)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _probability(x, m, total, scale):
    """One formula for all kernels: equal scores of target and draft must give bit-equal p and q."""
    return tl.exp2((x - m) * scale) / total


@triton.jit
def _lift(p, power, divisor):
    """Lenience: f(p) = p^power / divisor; strict rules pass 1, 1 and get p itself."""
    lifted = p
    if power != 1.0:
        lifted = tl.where(p == 0, 0.0, tl.exp2(power * tl.log2(tl.where(p == 0, 1.0, p))))
    if divisor != 1.0:
        lifted = lifted / divisor
    return lifted


@triton.jit
def _statistics(
    p_x, p_tokens, p_lengths, p_temperature, p_part, p_best, p_at, stride_r, stride_k, K, V, n, part_size, n_parts,
    SUMS: tl.constexpr, BEST: tl.constexpr, b_U: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """Part i_p of one of the n positions of a row: maximum m, Σ e^((x−m)/t) and the first index of m.

    ``p_at`` gets the drafted token's score. n is K+1 for the target's scores and K for the draft's; positions that the
    row's length does not reach are never read.
    """
    i_n, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_r, i_k = i_n // n, i_n % n
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    if i_k >= length + n - K:
        return
    start = i_p * part_size
    end = tl.minimum(start + part_size, V)
    p_row = p_x + i_r * stride_r + i_k * stride_k
    o_v = tl.arange(0, b_U)[:, None] * b_V + tl.arange(0, b_V)[None, :]
    # one running maximum a lane: lanes are joined once, at the end
    m = tl.full((b_V,), float("-inf"), tl.float32)
    total = tl.zeros((b_V,), tl.float32)
    best = tl.full((b_V,), NO_TOKEN, tl.int32)
    if SUMS:
        scale = LOG2_E / tl.load(p_temperature + i_r)
    for tile in range(start, end, b_U * b_V):
        v = tile + o_v
        x = tl.load(p_row + v, mask=v < end, other=float("-inf")).to(tl.float32)
        top = tl.max(x, 0)
        m_new = tl.maximum(m, top)
        if SUMS:
            # -inf − -inf would be NaN
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            total = total * tl.exp2((m - base) * scale) + tl.sum(tl.exp2((x - base[None, :]) * scale), 0)
        if BEST:
            best = tl.where(top > m, tl.min(tl.where(x == top[None, :], v, NO_TOKEN), 0), best)
        m = m_new
    m_all = tl.max(m, 0)
    p_here = p_part + (i_n * n_parts + i_p) * 2
    tl.store(p_here, m_all)
    if SUMS:
        base = tl.where(m_all == float("-inf"), 0.0, m_all)
        tl.store(p_here + 1, tl.sum(total * tl.exp2((m - base) * scale), 0))
        token = tl.load(p_tokens + i_r * K + i_k, mask=i_k < length, other=-1)
        here = (token >= start) & (token < end)
        tl.store(p_at + i_n, tl.load(p_row + token, mask=here, other=0.0).to(tl.float32), mask=here)
    if BEST:
        tl.store(p_best + i_n * n_parts + i_p, tl.min(tl.where(m == m_all, best, NO_TOKEN), 0))


@triton.jit
def _join(p_part, at, mask, n_parts, scale, b_part: tl.constexpr):
    """The parts of positions ``at`` [b_K] → maximum m and total Σ e^((x−m)/t), [b_K] each."""
    o_p = tl.arange(0, b_part)
    inside = mask[:, None] & (o_p < n_parts)[None, :]
    p_here = p_part + (at[:, None] * n_parts + o_p[None, :]) * 2
    m = tl.load(p_here, mask=inside, other=float("-inf"))
    total = tl.load(p_here + 1, mask=inside, other=0.0)
    m_all = tl.max(m, 1)
    base = tl.where(m_all == float("-inf"), 0.0, m_all)
    return m_all, tl.sum(total * tl.exp2((m - base[:, None]) * scale), 1)


@triton.jit
def _decide_greedy(
    p_part, p_best, p_at, p_tokens, p_lengths, p_temperature, p_accepted, p_next, K, V, n_parts, power, divisor,
    LENIENT: tl.constexpr, b_K: tl.constexpr, b_part: tl.constexpr,
):  # fmt: skip
    """The longest prefix of argmaxes (or of tokens with f(p) ≥ max p) of row i_r, and the argmax after it."""
    i_r = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    o_p = tl.arange(0, b_part)
    accepted = length
    for start in range(0, length, b_K):
        o_k = start + tl.arange(0, b_K)
        drafted = o_k < length
        at = i_r * (K + 1) + o_k
        inside = drafted[:, None] & (o_p < n_parts)[None, :]
        parts = at[:, None] * n_parts + o_p[None, :]
        m = tl.load(p_part + parts * 2, mask=inside, other=float("-inf"))
        best = tl.load(p_best + parts, mask=inside, other=NO_TOKEN)
        best = tl.min(tl.where(m == tl.max(m, 1)[:, None], best, NO_TOKEN), 1)
        token = tl.load(p_tokens + i_r * K + o_k, mask=drafted, other=-1)
        kept = token == best
        if LENIENT:
            scale = LOG2_E / tl.load(p_temperature + i_r)
            m_all, total = _join(p_part, at, drafted, n_parts, scale, b_part)
            known = drafted & (token >= 0) & (token < V)
            x = tl.load(p_at + at, mask=known, other=float("-inf"))
            kept = kept | (_lift(_probability(x, m_all, total, scale), power, divisor) >= 1.0 / total)
        refused = drafted & (kept == 0)
        accepted = tl.minimum(accepted, tl.min(tl.where(refused, o_k, length), 0))
    parts = (i_r * (K + 1) + accepted) * n_parts + o_p
    m = tl.load(p_part + parts * 2, mask=o_p < n_parts, other=float("-inf"))
    best = tl.load(p_best + parts, mask=o_p < n_parts, other=NO_TOKEN)
    following = tl.min(tl.where(m == tl.max(m, 0), best, NO_TOKEN), 0)
    tl.store(p_accepted + i_r, accepted.to(tl.int64))
    tl.store(p_next + i_r, tl.where(following < V, following, -1).to(tl.int64))


@triton.jit(do_not_specialize=["block"])
def _decide(
    p_part, p_at, p_part_q, p_at_q, p_q, p_tokens, p_lengths, p_uniforms, p_temperature,
    p_norm, p_norm_q, p_weight, p_mass, p_accepted,
    stride_qr, stride_qk, K, V, n_parts, block, power, divisor,
    Q: tl.constexpr, b_K: tl.constexpr, b_part: tl.constexpr,
):  # fmt: skip
    """Row i_r: normalisers, and by the token rule the tokens kept; for the block rule P_i (and S_i without q).

    ``p_norm`` [R, K+1, 2] and ``p_norm_q`` [R, K+1, 2] get m and total; ``p_weight`` [R, K+1] gets P_i (1: token rule).
    """
    i_r = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    scale = LOG2_E / tl.load(p_temperature + i_r)
    lane = tl.arange(0, b_K)
    accepted = length
    weight = tl.full((), 1.0, tl.float64)
    for start in range(0, length + 1, b_K):
        o_k = start + lane
        drafted, live = o_k < length, o_k <= length
        at = i_r * (K + 1) + o_k
        m, total = _join(p_part, at, live, n_parts, scale, b_part)
        tl.store(p_norm + at * 2, m, mask=live)
        tl.store(p_norm + at * 2 + 1, total, mask=live)
        token = tl.load(p_tokens + i_r * K + o_k, mask=drafted, other=-1)
        known = drafted & (token >= 0) & (token < V)
        x = tl.load(p_at + at, mask=known, other=float("-inf"))
        p = _probability(x, m, total, scale).to(tl.float64)
        if Q == 0:
            q = tl.full((b_K,), 1.0, tl.float64)
        elif Q == 1:
            here = i_r * stride_qr + o_k.to(tl.int64) * stride_qk + token
            q = tl.load(p_q + here, mask=known, other=0.0).to(tl.float64)
        else:
            at_q = i_r * K + o_k
            m, total = _join(p_part_q, at_q, drafted, n_parts, scale, b_part)
            tl.store(p_norm_q + at * 2, m, mask=drafted)
            tl.store(p_norm_q + at * 2 + 1, total, mask=drafted)
            x = tl.load(p_at_q + at_q, mask=known, other=float("-inf"))
            q = _probability(x, m, total, scale).to(tl.float64)
        prefix = tl.full((b_K,), 1.0, tl.float64)
        if block != 0:
            for j in range(tl.minimum(length + 1 - start, b_K)):
                prefix = tl.where(lane == j, weight, prefix)
                p_j, q_j = tl.sum(tl.where(lane == j, p, 0.0), 0), tl.sum(tl.where(lane == j, q, 0.0), 0)
                grown = weight * p_j / q_j
                weight = tl.where(grown == grown, tl.minimum(grown, 1.0), 0.0)
            if Q == 0:
                tl.store(p_mass + at, prefix * (1 - p), mask=drafted)
        else:
            u = tl.load(p_uniforms + at, mask=drafted, other=0.0)
            refused = drafted & ((u * q < _lift(p, power, divisor)) == 0)
            accepted = tl.minimum(accepted, tl.min(tl.where(refused, o_k, length), 0))
        tl.store(p_weight + at, prefix, mask=live)
    tl.store(p_accepted + i_r, accepted.to(tl.int64), mask=block == 0)


@triton.jit
def _decide_block(
    p_weight, p_mass, p_lengths, p_uniforms, p_accepted, K, n_parts,
    SAMPLED: tl.constexpr, b_K: tl.constexpr, b_part: tl.constexpr,
):  # fmt: skip
    """Row i_r by the block rule: the longest prefix i with u_i < h_i = S_i / (S_i + 1 − P_i), or u_L < P_L.

    ``p_mass``: S_i, [R, K+1], or for sampled drafts the parts that ``_weigh`` left, [R, K, n_parts, 2].
    """
    i_r = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    o_p = tl.arange(0, b_part)
    accepted = tl.full((), 0, tl.int32)
    for start in range(0, length + 1, b_K):
        o_k = start + tl.arange(0, b_K)
        at = i_r * (K + 1) + o_k
        tested = (o_k > 0) & (o_k <= length)
        weight = tl.load(p_weight + at, mask=tested, other=0.0)
        # once P is 0 it stays 0 and no longer prefix can be kept
        inner = tested & (o_k < length) & (weight > 0)
        if SAMPLED:
            inside = inner[:, None] & (o_p < n_parts)[None, :]
            parts = (i_r * K + o_k)[:, None] * n_parts + o_p[None, :]
            left = tl.sum(tl.load(p_mass + parts * 2, mask=inside, other=0.0), 1)
        else:
            left = tl.load(p_mass + at, mask=inner, other=0.0)
        chance = left / tl.where(inner, left + 1 - weight, 1.0)
        # 0/0 is a prefix that fits (P = 1) before a position where p = q: nothing is lost by keeping it
        chance = tl.where(chance == chance, chance, 1.0)
        chance = tl.where(o_k < length, chance, weight)
        u = tl.load(p_uniforms + at - 1, mask=tested, other=1.0)
        kept = (inner | (tested & (o_k == length))) & (u < chance)
        accepted = tl.maximum(accepted, tl.max(tl.where(kept, o_k, 0), 0))
    tl.store(p_accepted + i_r, accepted.to(tl.int64))


@triton.jit
def _weights(
    p_x, p_q, p_norm, p_norm_q, p_tokens, p_temperature, i_r, i_k, v, V, length, stride_r, stride_k, stride_qr,
    stride_qk, K, weight, power, divisor, Q: tl.constexpr,
):  # fmt: skip
    """Tokens v at position i_k → max(P f(p) − q, 0) (p itself after the whole draft) and p."""
    at = i_r * (K + 1) + i_k
    residual = i_k < length
    scale = LOG2_E / tl.load(p_temperature + i_r)
    x = tl.load(p_x + i_r * stride_r + i_k * stride_k + v, mask=v < V, other=float("-inf")).to(tl.float32)
    p = _probability(x, tl.load(p_norm + at * 2), tl.load(p_norm + at * 2 + 1), scale)
    weights = _lift(p, power, divisor) * weight.to(tl.float32)
    if Q == 0:
        token = tl.load(p_tokens + i_r * K + i_k, mask=residual, other=-1)
        weights = tl.where(v == token, 0.0, weights)
    else:
        q = tl.load(p_q + i_r * stride_qr + i_k * stride_qk + v, mask=(v < V) & residual, other=0.0).to(tl.float32)
        if Q == 2:
            m = tl.load(p_norm_q + at * 2, mask=residual, other=0.0)
            q = _probability(q, m, tl.load(p_norm_q + at * 2 + 1, mask=residual, other=1.0), scale)
        weights -= q
        # not tl.maximum, which would swallow NaN
        weights = tl.where(weights < 0, 0.0, weights)
    outside = v >= V
    return tl.where(outside, 0.0, tl.where(residual, weights, p)), tl.where(outside, 0.0, p)


@triton.jit(do_not_specialize=["n"])
def _weigh(
    p_x, p_q, p_norm, p_norm_q, p_tokens, p_lengths, p_temperature, p_weight, p_accepted, p_sums,
    stride_r, stride_k, stride_qr, stride_qk, K, V, n, part_size, n_parts, power, divisor,
    Q: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """Part i_p of the weights' sum and of p's: at the position where the row stopped (n = 1), or at n = K positions.

    The latter are S_i for the block rule, wanted where 0 < i < L and P_i > 0.
    """
    i_n, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_r = i_n // n
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    i_k = tl.where(n == 1, tl.load(p_accepted + i_r, mask=n == 1, other=0), i_n % n)
    weight = tl.load(p_weight + i_r * (K + 1) + i_k)
    if (n > 1) & ((i_k == 0) | (i_k >= length) | (weight <= 0)):
        return
    weights_sum = tl.full((), 0.0, tl.float64)
    p_sum = tl.full((), 0.0, tl.float64)
    for tile in range(0, part_size, b_V):
        v = i_p * part_size + tile + tl.arange(0, b_V)
        weights, p = _weights(
            p_x, p_q, p_norm, p_norm_q, p_tokens, p_temperature, i_r, i_k, v, V, length, stride_r, stride_k, stride_qr,
            stride_qk, K, weight, power, divisor, Q,
        )  # fmt: skip
        weights_sum += tl.sum(weights.to(tl.float64), 0)
        p_sum += tl.sum(p.to(tl.float64), 0)
    p_here = p_sums + (i_n * n_parts + i_p) * 2
    tl.store(p_here, weights_sum)
    tl.store(p_here + 1, p_sum)


@triton.jit
def _pick(
    p_x, p_q, p_norm, p_norm_q, p_tokens, p_lengths, p_uniforms, p_temperature, p_weight, p_accepted, p_sums, p_next,
    stride_r, stride_k, stride_qr, stride_qk, K, V, part_size, n_parts, power, divisor,
    Q: tl.constexpr, b_V: tl.constexpr, b_part: tl.constexpr,
):  # fmt: skip
    """Row i_r: the part, and in it the token, at which the cumulated weights pass u · total; -1 without any weight."""
    i_r = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(p_lengths + i_r), 0), K).to(tl.int32)
    i_k = tl.load(p_accepted + i_r)
    weight = tl.load(p_weight + i_r * (K + 1) + i_k)
    o_p = tl.arange(0, b_part)
    p_here = p_sums + (i_r * n_parts + o_p) * 2
    sums = tl.load(p_here, mask=o_p < n_parts, other=0.0)
    # p and q that differ by rounding alone can refuse a token and leave nothing: p itself is then the answer
    empty = tl.sum(sums, 0) == 0
    sums = tl.where(empty, tl.load(p_here + 1, mask=o_p < n_parts, other=0.0), sums)
    total = tl.sum(sums, 0)
    passing = tl.load(p_uniforms + i_r * (K + 1) + K) * total
    # a parallel sum may pass anywhere by rounding: only what has weight counts, and the last such one if none passes
    part = tl.min(tl.where((tl.cumsum(sums, 0) > passing) & (sums > 0), o_p, b_part), 0)
    part = tl.where(part < b_part, part, tl.maximum(tl.max(tl.where(sums > 0, o_p, -1), 0), 0))
    cumulated = tl.sum(tl.where(o_p < part, sums, 0.0), 0)
    first = tl.full((), NO_TOKEN, tl.int32)
    last = tl.full((), -1, tl.int32)
    for tile in range(0, part_size, b_V):
        v = part * part_size + tile + tl.arange(0, b_V)
        weights, p = _weights(
            p_x, p_q, p_norm, p_norm_q, p_tokens, p_temperature, i_r, i_k, v, V, length, stride_r, stride_k, stride_qr,
            stride_qk, K, weight, power, divisor, Q,
        )  # fmt: skip
        weights = tl.where(empty, p, weights)
        exact = weights.to(tl.float64)
        passed = (cumulated + tl.cumsum(exact, 0) > passing) & (weights > 0)
        first = tl.minimum(first, tl.min(tl.where(passed, v, NO_TOKEN), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, v, -1), 0))
        cumulated += tl.sum(exact, 0)
    token = tl.where(first < V, first, last)
    tl.store(p_next + i_r, tl.where((total > 0) & (total < float("inf")), token, -1).to(tl.int64))


def verify(
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    q: Tensor | None = None,
    draft_scores: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    greedy: bool = False,
    uniforms: Tensor | None = None,
    acceptance: str = "token",
    lenience: Lenience | None = None,
) -> Verdict:
    """``accel.kernels.verify.verify`` on a GPU; no value is brought to the host."""
    R, n, V = scores.shape
    K, device = n - 1, scores.device
    verdict = Verdict(*(torch.empty(R, dtype=torch.int64, device=device) for _ in range(2)))
    if not R:
        return verdict
    x = _readable(scores)
    tokens, lengths = tokens.contiguous(), lengths.contiguous()
    power, divisor = _power_and_divisor(lenience)
    lenient = (power, divisor) != (1.0, 1.0)
    degrees = None
    if lenient or not greedy:
        each = temperature if isinstance(temperature, Tensor) else torch.full((R,), float(temperature), device=device)
        degrees = each.float().contiguous()
    with torch.cuda.device_of(x):
        part, best, at, n_parts = _read(x, tokens, lengths, degrees, K, best=greedy, sums=lenient or not greedy)
        if greedy:
            _decide_greedy[(R,)](
                part, best, at, tokens, lengths, degrees, *verdict, K, V, n_parts, power, divisor,
                LENIENT=lenient, b_K=POSITIONS, b_part=PARTS, num_warps=4,
            )  # fmt: skip
            return verdict
        assert uniforms is not None
        uniforms = uniforms.contiguous()
        draft, kind = (q, PROBABILITIES) if draft_scores is None else (draft_scores, SCORES)
        part_q = at_q = norm_q = None
        if draft is None or K == 0:
            draft, kind = None, NO_Q
        else:
            draft = _readable(draft if draft.dtype == x.dtype else draft.float())
            if kind == SCORES:
                part_q, _, at_q, _ = _read(draft, tokens, lengths, degrees, K, best=False, sums=True)
                norm_q = x.new_empty(R, n, 2, dtype=torch.float32)
        norm = x.new_empty(R, n, 2, dtype=torch.float32)
        weight = x.new_empty(R, n, dtype=torch.float64)
        block = acceptance == "block"
        mass = weight.new_empty(R, n) if kind == NO_Q else None
        stride_qr, stride_qk = (0, 0) if draft is None else draft.stride()[:2]
        _decide[(R,)](
            part, at, part_q, at_q, draft if kind == PROBABILITIES else None, tokens, lengths, uniforms, degrees,
            norm, norm_q, weight, mass, verdict.n_accepted, stride_qr, stride_qk, K, V, n_parts, int(block), power,
            divisor, Q=kind, b_K=POSITIONS, b_part=PARTS, num_warps=4,
        )  # fmt: skip
        part_size, n_tiles = _parts(V, WEIGHTS)
        shared = (x, draft, norm, norm_q, tokens, lengths)
        strides = (*x.stride()[:2], stride_qr, stride_qk)

        def weigh(positions: int) -> Tensor:
            sums = weight.new_empty(R * positions, n_tiles, 2)
            _weigh[(R * positions, n_tiles)](
                *shared, degrees, weight, verdict.n_accepted, sums, *strides, K, V, positions, part_size, n_tiles,
                power, divisor, Q=kind, b_V=WEIGHTS, num_warps=8,
            )  # fmt: skip
            return sums

        if block:
            if kind != NO_Q:
                # without two drafted tokens no prefix but the empty and the whole one is looked at
                mass = weigh(K) if K > 1 else weight
            _decide_block[(R,)](
                weight, mass, lengths, uniforms, verdict.n_accepted, K, n_tiles,
                SAMPLED=kind != NO_Q, b_K=POSITIONS, b_part=PARTS, num_warps=4,
            )  # fmt: skip
        sums = weigh(1)
        _pick[(R,)](
            *shared, uniforms, degrees, weight, verdict.n_accepted, sums, verdict.next_token, *strides, K, V, part_size,
            n_tiles, power, divisor, Q=kind, b_V=WEIGHTS, b_part=PARTS, num_warps=8,
        )  # fmt: skip
    return verdict


def _read(
    x: Tensor, tokens: Tensor, lengths: Tensor, degrees: Tensor | None, K: int, *, best: bool, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Scores x [R, n, V] → parts [R·n, P, 2], first maxima [R·n, P], the drafted tokens' scores [R·n], P."""
    R, n, V = x.shape
    part_size, n_parts = _parts(V, PART)
    part = x.new_empty(R * n, n_parts, 2, dtype=torch.float32)
    first = x.new_empty(R * n, n_parts, dtype=torch.int32) if best else None
    at = x.new_empty(R * n, dtype=torch.float32) if sums else None
    _statistics[(R * n, n_parts)](
        x, tokens, lengths, degrees, part, first, at, *x.stride()[:2], K, V, n, part_size, n_parts,
        SUMS=sums, BEST=best, **_tile(x.dtype), num_warps=4,
    )  # fmt: skip
    return part, first, at, n_parts


def _readable(x: Tensor) -> Tensor:
    """Rows without gaps, in a type that the kernels read."""
    x = x if x.dtype in (torch.bfloat16, torch.float16, torch.float32) else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """Lines of 16 bytes a thread, for 4 warps: a maximum or sum over lines then stays within each thread."""
    line = 4 * 32 * 16 // dtype.itemsize
    return {"b_U": LOGITS // line, "b_V": line}


def _parts(V: int, part: int) -> tuple[int, int]:
    """Size and number of a vocabulary's parts: by V alone, so that a row's sums do not depend on its batch."""
    size = triton.cdiv(triton.cdiv(V, PARTS), part) * part
    return size, triton.cdiv(V, size)


def _power_and_divisor(lenience: Lenience | None) -> tuple[float, float]:
    if lenience is None:
        return 1.0, 1.0
    rule, eps = lenience
    return (float(eps), 1.0) if rule == "exp" else (1.0, float(eps if rule == "lin" else eps**2))


TYPES = {
    **dict.fromkeys("p_tokens p_lengths p_accepted p_next".split(), "*i64"),
    **dict.fromkeys("p_uniforms p_weight p_mass p_sums".split(), "*fp64"),
    **dict.fromkeys("p_temperature p_part p_at p_part_q p_at_q p_norm p_norm_q".split(), "*fp32"),
    **dict.fromkeys("stride_r stride_k stride_qr stride_qk".split(), "i64"),
    **dict.fromkeys("K V n n_parts part_size block".split(), "i32"),
    **dict.fromkeys(("power", "divisor"), "fp32"),
    "p_best": "*i32",
}


def builds() -> Iterator[Build]:
    """Every configuration that the function above launches."""

    def build(kernel, config: str, constants: dict, num_warps: int, absent: str = "", **pointers: str) -> Build:
        constants = constants | dict.fromkeys(absent.split())
        types = {name: (TYPES | pointers)[name] for name in kernel.arg_names if name not in constants}
        whole = [name for name in ("part_size", "stride_r", "stride_k", "stride_qr", "stride_qk") if name in types]
        return Build("verify", kernel, config, types, constants, divisible=whole, num_warps=num_warps)

    small = {"b_K": POSITIONS, "b_part": PARTS}
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in (halves | {"fp32": torch.float32}).items():
        tiles = _tile(dtype)
        kinds = (
            ("sums", True, False, "p_best"),
            ("argmax", False, True, "p_temperature p_at"),
            ("both", True, True, ""),
        )
        for kind, sums, best, absent in kinds:
            constants = {"SUMS": sums, "BEST": best} | tiles
            yield build(_statistics, f"{name}, {kind}", constants, 4, absent, p_x=f"*{name}")
    yield build(_decide_greedy, "strict", {"LENIENT": False} | small, 4, "p_at p_temperature")
    yield build(_decide_greedy, "lenient", {"LENIENT": True} | small, 4)
    without_q, without_scores = "p_q p_norm_q", "p_norm_q"
    yield build(_decide, "no q", {"Q": NO_Q} | small, 4, f"p_part_q p_at_q {without_q}")
    for name in (*halves, "fp32"):
        absent = f"p_part_q p_at_q p_mass {without_scores}"
        yield build(_decide, f"{name} q", {"Q": PROBABILITIES} | small, 4, absent, p_q=f"*{name}")
    yield build(_decide, "draft scores", {"Q": SCORES} | small, 4, "p_q p_mass")
    yield build(_decide_block, "no q", {"SAMPLED": False} | small, 4)
    yield build(_decide_block, "sampled", {"SAMPLED": True} | small, 4)
    for kernel, constants in ((_weigh, {"b_V": WEIGHTS}), (_pick, {"b_V": WEIGHTS, "b_part": PARTS})):
        for name in (*halves, "fp32"):
            yield build(kernel, f"{name}, no q", {"Q": NO_Q} | constants, 8, without_q, p_x=f"*{name}")
            for other in dict.fromkeys((name, "fp32")):
                pointers = {"p_x": f"*{name}", "p_q": f"*{other}"}
                config = f"{name}, {other} q"
                yield build(kernel, config, {"Q": PROBABILITIES} | constants, 8, without_scores, **pointers)
                yield build(kernel, f"{name}, {other} draft scores", {"Q": SCORES} | constants, 8, **pointers)
