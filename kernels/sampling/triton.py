"""Triton kernels of the sampling family: two readings of the logits at most, the second mostly from the L2 cache.

``_part`` reduces each part of a row's vocabulary. Without truncation ``_choose``, one program a row, picks the part
where the draw falls and walks that part alone. With truncation ``_gather`` copies the few tokens that can be kept to a
list, and ``_choose`` searches the thresholds there. A row whose candidates do not fit the list is searched as it
stands: as right, only slower. README.md has the equations and the argument why the list suffices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.sampling.reference import Sampled
from accel.kernels.sampling.settings import Settings

# logits a program of _part and _gather reads, and how many such parts a row may have
PART = 4096
PARTS = 128
# the coarse histogram below each row's maximum: BINS cells of WIDTH nats each
BINS = 8
# candidates a row's list holds, and entries looked at at a time (with fewer, ptxas saves registers and spills some)
CANDIDATES = 8192
TILE = 4096
# the power of two that holds the top tokens of all parts (20 · 128)
TOP_OF_PARTS = 4096


@triton.jit
def _score(p_x, p_counts, p_set, v, inside):
    """Penalised logits fp32 of tokens v; p_x and p_counts point at the row, p_set at its settings."""
    x = tl.load(p_x + v, mask=inside, other=float("-inf")).to(tl.float32)
    if p_counts is not None:
        count = tl.load(p_counts + v, mask=inside, other=0).to(tl.float32)
        repetition = tl.load(p_set + 5)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        # fma by name: whether the compiler fuses must not differ between kernels that have to agree
        repeated = tl.fma(-count, tl.load(p_set + 7), repeated) - tl.load(p_set + 6)
        x = tl.where(count > 0, repeated, x)
    return x


@triton.jit
def _share(x, top, scale):
    """e^((x − top) / T): NaN where a logit is NaN or +inf, 0 where it is -inf."""
    return tl.where(x == float("-inf"), 0.0, tl.exp((x - top) * scale))


@triton.jit
def _weight(x, top, scale):
    return (_share(x, top, scale) * 1099511627776.0).to(tl.int64)


@triton.jit
def _depth(x, top, scale):
    """How many cells of 1.25 nats x lies below top; cells lie on one grid for all parts of a row."""
    return tl.floor(top * scale * 0.8) - tl.floor(x * scale * 0.8)


@triton.jit
def _key(x):
    """fp32 → int64 of 32 bits in the same order; -0 goes where 0 is."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _part(
    p_x, p_counts, p_settings, p_max, p_sum, p_first, p_bin_count, p_bin_sum, stride_x, V, n_parts,
    HISTOGRAM: tl.constexpr, b_V: tl.constexpr, b_B: tl.constexpr,
):  # fmt: skip
    """Part i_p of row i_r: maximum m, its first index, Σ e^((x−m)/T), and count and sum of each cell below m."""
    i_r, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_set = p_settings + i_r * 8
    scale = tl.load(p_set)
    v = i_p * b_V + tl.arange(0, b_V)
    if p_counts is None:
        x = _score(p_x + i_r * stride_x, None, p_set, v, v < V)
    else:
        x = _score(p_x + i_r * stride_x, p_counts + i_r * V, p_set, v, v < V)
    m = tl.max(x, 0)
    e = _share(x, m, scale)
    at = i_r * n_parts + i_p
    tl.store(p_max + at, m)
    tl.store(p_sum + at, tl.sum(e, 0))
    tl.store(p_first + at, tl.min(tl.where(x == m, v, V), 0))
    if HISTOGRAM:
        depth = _depth(x, m, scale)
        for cell in tl.static_range(b_B):
            here = depth == cell
            tl.store(p_bin_count + at * b_B + cell, tl.sum(here.to(tl.int32), 0))
            tl.store(p_bin_sum + at * b_B + cell, tl.sum(tl.where(here, e, 0.0), 0))


@triton.jit
def _gather(
    p_x, p_counts, p_settings, p_max, p_sum, p_bin_count, p_bin_sum, p_n, p_total, p_list_x, p_list_v, stride_x, V,
    n_parts, b_V: tl.constexpr, b_P: tl.constexpr, b_B: tl.constexpr, b_L: tl.constexpr,
):  # fmt: skip
    """Append part i_p's candidates to row i_r's list, in the vocabulary's order; n = -1: they do not fit.

    Candidates are all tokens in the fewest cells that are sure to hold what the row's first filter keeps.
    """
    i_r, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_set = p_settings + i_r * 8
    scale, greedy = tl.load(p_set), tl.load(p_set + 1)
    k, top_p, min_p = tl.load(p_set + 2), tl.load(p_set + 3), tl.load(p_set + 4)
    by_k, by_p = (k > 0) & (k < V), top_p < 1
    if (greedy == 0) & (by_k | by_p | (min_p > 0)):
        o_p, o_b = tl.arange(0, b_P), tl.arange(0, b_B)
        inside = o_p < n_parts
        m_part = tl.load(p_max + i_r * n_parts + o_p, mask=inside, other=float("-inf"))
        m = tl.max(m_part, 0)
        rest = _share(m_part, m, scale)
        z = tl.sum(rest * tl.load(p_sum + i_r * n_parts + o_p, mask=inside, other=0.0), 0)
        o_bin = (i_r * n_parts + o_p)[:, None] * b_B + o_b[None, :]
        count = tl.load(p_bin_count + o_bin, mask=inside[:, None], other=0)
        mass = tl.load(p_bin_sum + o_bin, mask=inside[:, None], other=0.0) * rest[:, None]
        offset = _depth(m_part, m, scale)
        depth = offset[:, None] + o_b[None, :]  # [b_P, b_B]
        cut = -1
        for cells in tl.static_range(b_B):
            covered = depth <= cells
            k_found = tl.sum(tl.sum(tl.where(covered, count, 0), 1), 0) >= k
            # these sums are rounded, and need only be on the safe side
            p_found = tl.sum(tl.sum(tl.where(covered, mass, 0.0), 1), 0) >= top_p * z * 1.0001
            found = tl.where(by_k, k_found, tl.where(by_p, p_found, tl.exp(cells * -1.25) * 1.001 <= min_p))
            cut = tl.where(found & (cut < 0), cells, cut)
        per_part = tl.sum(tl.where(depth <= cut, count, 0), 1)
        n = tl.sum(per_part, 0)
        fits = (cut >= 0) & (n <= b_L)
        if i_p == 0:
            tl.store(p_n + i_r, tl.where(fits, n, -1))
        mine = tl.sum(tl.where(o_p == i_p, per_part, 0), 0)
        by_total = by_p & (by_k == 0)
        if (fits & (mine > 0)) | by_total:
            v = i_p * b_V + tl.arange(0, b_V)
            if p_counts is None:
                x = _score(p_x + i_r * stride_x, None, p_set, v, v < V)
            else:
                x = _score(p_x + i_r * stride_x, p_counts + i_r * V, p_set, v, v < V)
            tl.store(p_total + i_r * n_parts + i_p, tl.sum(_weight(x, m, scale), 0))
            m_mine = tl.load(p_max + i_r * n_parts + i_p)
            listed = fits & (_depth(m_mine, m, scale) + _depth(x, m_mine, scale) <= cut)
            before = tl.sum(tl.where(o_p < i_p, per_part, 0), 0)
            o_l = i_r * b_L + before + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(p_list_x + o_l, x, mask=listed)
            tl.store(p_list_v + o_l, v, mask=listed)


@triton.jit
def _entry(p_x, p_counts, p_set, p_list_x, p_list_v, o, n, V):
    """Entries o of the row's list (n ≥ 0), or tokens o of the row itself: scores and token ids."""
    # masks instead of branches: what is masked off is not read
    whole, listed = (n < 0) & (o < V), o < n
    x = _score(p_x, p_counts, p_set, o, whole)
    x = tl.where(listed, tl.load(p_list_x + o, mask=listed, other=float("-inf")), x)
    v = tl.where(whole, o, tl.load(p_list_v + o, mask=listed, other=V))
    return x, v


@triton.jit
def _search(p_x, p_counts, p_set, p_list_x, p_list_v, n, V, m, scale, low, high, limit,
            BY_WEIGHT: tl.constexpr, b_T: tl.constexpr):  # fmt: skip
    """The least key in low..high with less than ``limit`` strictly above it: tokens, or their weight."""
    size = tl.where(n < 0, V, n)
    while low < high:
        middle = (low + high) >> 1
        above = tl.zeros((b_T,), tl.int64)
        for tile in range(0, size, b_T):
            x, _ = _entry(p_x, p_counts, p_set, p_list_x, p_list_v, tile + tl.arange(0, b_T), n, V)
            if BY_WEIGHT:
                amount = _weight(x, m, scale)
            else:
                amount = tl.full((b_T,), 1, tl.int64)
            above += tl.where(_key(x) > middle, amount, 0)
        enough = tl.sum(above, 0) < limit
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _choose(
    p_x, p_counts, p_settings, p_max, p_sum, p_first, p_n, p_total, p_list_x, p_list_v, p_uniform,
    p_token, p_logprob, p_summary, stride_x, V, n_parts,
    TRUNCATE: tl.constexpr, b_V: tl.constexpr, b_P: tl.constexpr, b_L: tl.constexpr, b_T: tl.constexpr,
):  # fmt: skip
    """Row i_r's token and log-probability, and what top_logprobs needs: max, scale, ln Z and the thresholds."""
    i_r = tl.program_id(0).to(tl.int64)
    p_set = p_settings + i_r * 8
    scale, greedy = tl.load(p_set), tl.load(p_set + 1)
    k, top_p, min_p = tl.load(p_set + 2), tl.load(p_set + 3), tl.load(p_set + 4)
    u = tl.load(p_uniform + i_r)
    p_row = p_x + i_r * stride_x
    if p_counts is None:
        p_seen = None
    else:
        p_seen = p_counts + i_r * V
    o_p = tl.arange(0, b_P)
    inside = o_p < n_parts
    m_part = tl.load(p_max + i_r * n_parts + o_p, mask=inside, other=float("-inf"))
    m = tl.max(m_part, 0)
    first = tl.load(p_first + i_r * n_parts + o_p, mask=inside, other=2147483647)
    # in fp64 the parts add up without an error that a row could notice
    z_part = tl.load(p_sum + i_r * n_parts + o_p, mask=inside, other=0.0).to(tl.float64)
    z_part = z_part * _share(m_part, m, scale)
    z = tl.sum(z_part, 0)
    valid = (z > 0) & (z < float("inf"))
    token = tl.min(tl.where((m_part == m) & inside, first, 2147483647), 0)
    best = m
    z_kept = z.to(tl.float32)
    lowest = _key(m) * 0 - 2147483648
    least_share = 0.0
    cut = (k > 0) & (k < V) | (top_p < 1) | (min_p > 0)
    p_x_list, p_v_list = p_list_x + i_r * b_L, p_list_v + i_r * b_L
    o_t = tl.arange(0, b_T)
    if valid & (greedy == 0):
        # the draw walks entries begin..size of the list or the row, weighed against origin
        origin, begin = m, 0
        if TRUNCATE and cut:
            n = tl.load(p_n + i_r)
            size = tl.where(n < 0, V, n)
            high = _key(m)
            low = high
            for tile in range(0, size, b_T):
                x, _ = _entry(p_row, p_seen, p_set, p_x_list, p_v_list, tile + o_t, n, V)
                low = tl.minimum(low, tl.min(tl.where(x > float("-inf"), _key(x), high), 0))
            lowest = low
            if (k > 0) & (k < V):
                lowest = _search(p_row, p_seen, p_set, p_x_list, p_v_list, n, V, m, scale, low, high, k.to(tl.int64),
                                 BY_WEIGHT=False, b_T=b_T)  # fmt: skip
            if top_p < 1:
                if (k > 0) & (k < V):
                    kept = tl.zeros((b_T,), tl.int64)
                    for tile in range(0, size, b_T):
                        x, _ = _entry(p_row, p_seen, p_set, p_x_list, p_v_list, tile + o_t, n, V)
                        kept += tl.where(_key(x) >= lowest, _weight(x, m, scale), 0)
                    total = tl.sum(kept, 0)
                else:
                    total = tl.sum(tl.load(p_total + i_r * n_parts + o_p, mask=inside, other=0), 0)
                limit = tl.maximum(tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
                lowest = _search(p_row, p_seen, p_set, p_x_list, p_v_list, n, V, m, scale, lowest, high, limit,
                                 BY_WEIGHT=True, b_T=b_T)  # fmt: skip
            least_share = min_p
        else:
            n, sums = -1, tl.cumsum(z_part, 0)
            goal = u * z
            some = z_part > 0
            # where rounding lets no part's sum pass the goal, the last one with any weight holds it
            part = tl.min(tl.where(some & (sums > goal), o_p, b_P), 0)
            part = tl.where(part == b_P, tl.max(tl.where(some, o_p, 0), 0), part)
            # from here on the part is all there is, and the goal a share of it
            into = goal - tl.sum(tl.where(o_p < part, z_part, 0.0), 0)
            u = tl.maximum(into, 0.0) / tl.sum(tl.where(o_p == part, z_part, 0.0), 0)
            origin = tl.max(tl.where(o_p == part, m_part, float("-inf")), 0)
            begin = part * b_V
            size = tl.minimum(begin + b_V, V)
        kept = tl.zeros((b_T,), tl.int64)
        for tile in range(begin, size, b_T):
            x, _ = _entry(p_row, p_seen, p_set, p_x_list, p_v_list, tile + o_t, n, V)
            keep = (tile + o_t < size) & (_key(x) >= lowest) & (_share(x, m, scale) >= least_share)
            kept += tl.where(keep, _weight(x, origin, scale), 0)
        total = tl.sum(kept, 0)
        if TRUNCATE and cut:
            z_kept = (total.to(tl.float64) * 9.094947017729282e-13).to(tl.float32)
        target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        token = V
        run = total * 0
        for tile in range(begin, size, b_T):
            x, v = _entry(p_row, p_seen, p_set, p_x_list, p_v_list, tile + o_t, n, V)
            keep = (tile + o_t < size) & (_key(x) >= lowest) & (_share(x, m, scale) >= least_share)
            weight = tl.where(keep, _weight(x, origin, scale), 0)
            passed = run + tl.cumsum(weight, 0) > target
            here = tl.min(tl.where(passed & (weight > 0), v, V), 0)
            best = tl.where(here < token, tl.max(tl.where(v == here, x, float("-inf")), 0), best)
            token = tl.minimum(token, here)
            run += tl.sum(weight, 0)
    log_z = tl.log(z_kept)
    tl.store(p_token + i_r, tl.where(valid, token, -1).to(tl.int64))
    tl.store(p_logprob + i_r, tl.where(valid, (best - m) * scale - log_z, float("nan")))
    p_here = p_summary + i_r * 5
    tl.store(p_here, m)
    tl.store(p_here + 1, scale)
    tl.store(p_here + 2, tl.where(valid, log_z, float("nan")))
    tl.store(p_here + 3, least_share)
    tl.store(p_here + 4, lowest.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _raw(p_x, p_max, p_sum, p_token, p_logprob, p_summary, stride_x, n_parts, b_P: tl.constexpr):
    """The chosen token's log-probability among the logits as they came, and the summary for the top tokens."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, b_P)
    inside = o_p < n_parts
    m_part = tl.load(p_max + i_r * n_parts + o_p, mask=inside, other=float("-inf"))
    m = tl.max(m_part, 0)
    z_part = tl.load(p_sum + i_r * n_parts + o_p, mask=inside, other=0.0) * _share(m_part, m, 1.0)
    log_z = tl.log(tl.sum(z_part, 0))
    token = tl.load(p_token + i_r)
    x = tl.load(p_x + i_r * stride_x + tl.maximum(token, 0)).to(tl.float32)
    tl.store(p_logprob + i_r, tl.where(token >= 0, x - m - log_z, float("nan")))
    p_here = p_summary + i_r * 5
    tl.store(p_here, m)
    tl.store(p_here + 1, 1.0)
    tl.store(p_here + 2, tl.where(token >= 0, log_z, float("nan")))
    tl.store(p_here + 3, 0.0)
    tl.store(p_here + 4, tl.full((), -2147483648, tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _top_part(p_x, p_counts, p_settings, p_key, p_token, stride_x, V, n_parts, n, b_V: tl.constexpr):
    """Part i_p's n largest logits and their tokens, one after another; the lower token first among equals."""
    i_r, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = i_p * b_V + tl.arange(0, b_V)
    if p_counts is None:
        x = _score(p_x + i_r * stride_x, None, p_settings, v, v < V)
    else:
        x = _score(p_x + i_r * stride_x, p_counts + i_r * V, p_settings + i_r * 8, v, v < V)
    # below every key, -inf's too: what is taken already or not there at all
    key = tl.where(v < V, _key(x), -2147483648).to(tl.int32)
    at = (i_r * n_parts + i_p) * n
    for i in range(n):
        largest = tl.max(key, 0)
        token = tl.min(tl.where(key == largest, v, 2147483647), 0)
        tl.store(p_key + at + i, largest)
        tl.store(p_token + at + i, token)
        key = tl.where(v == token, -2147483648, key)


@triton.jit
def _top_join(p_key, p_part_token, p_summary, p_token, p_logprob, n_parts, n, b_N: tl.constexpr):
    """The n largest of all parts' largest, and their log-probabilities; -inf for what was cut off."""
    i_r = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, b_N)
    inside = o_n < n_parts * n
    key = tl.load(p_key + i_r * n_parts * n + o_n, mask=inside, other=-2147483648)
    v = tl.load(p_part_token + i_r * n_parts * n + o_n, mask=inside, other=2147483647)
    p_here = p_summary + i_r * 5
    m, scale, log_z = tl.load(p_here), tl.load(p_here + 1), tl.load(p_here + 2)
    least_share, lowest = tl.load(p_here + 3), tl.load(p_here + 4).to(tl.int32, bitcast=True)
    for i in range(n):
        largest = tl.max(key, 0)
        token = tl.min(tl.where(key == largest, v, 2147483647), 0)
        x = tl.where(largest < 0, largest ^ 0x7FFFFFFF, largest).to(tl.float32, bitcast=True)
        keep = (largest >= lowest) & (_share(x, m, scale) >= least_share)
        logprob = tl.where(keep, (x - m) * scale - log_z, float("-inf"))
        tl.store(p_token + i_r * n + i, token.to(tl.int64))
        tl.store(p_logprob + i_r * n + i, tl.where(log_z == log_z, logprob, float("nan")))
        key = tl.where((v == token) & inside, -2147483648, key)


@triton.jit
def _uniforms(p_seed, p_position, p_uniform, n_columns, n, b_N: tl.constexpr):
    """Elements of uniforms [R, columns]: key = the row's seed, counter = (position, column)."""
    o_n = tl.program_id(0) * b_N + tl.arange(0, b_N)
    row, column = o_n // n_columns, o_n % n_columns
    seed = tl.load(p_seed + row, mask=o_n < n, other=0)
    position = tl.load(p_position + row, mask=o_n < n, other=0)
    a, b = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c = column.to(tl.uint32)
    d = c * 0
    key_0, key_1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        left = a.to(tl.uint64) * 0xD2511F53
        right = c.to(tl.uint64) * 0xCD9E8D57
        a, b = (right >> 32).to(tl.uint32) ^ b ^ key_0, right.to(tl.uint32)
        c, d = (left >> 32).to(tl.uint32) ^ d ^ key_1, left.to(tl.uint32)
        key_0 += tl.full((), 0x9E3779B9, tl.uint32)
        key_1 += tl.full((), 0xBB67AE85, tl.uint32)
    bits = (a >> 5).to(tl.int64) * 67108864 + (b >> 6).to(tl.int64)
    tl.store(p_uniform + o_n, bits.to(tl.float64) * 1.1102230246251565e-16, mask=o_n < n)


def sample(
    logits: Tensor,
    settings: Settings,
    *,
    counts: Tensor | None = None,
    uniforms: Tensor | None = None,
    top_logprobs: int = 0,
    logprobs_of: str = "processed",
) -> Sampled:
    """``accel.kernels.sampling.sample`` on a GPU, V ≤ 524,288; no value is brought to the host."""
    R, V = logits.shape
    x = logits if logits.stride(-1) == 1 else logits.contiguous()
    counts = counts.contiguous() if counts is not None and settings.penalises else None
    device, n_parts = x.device, triton.cdiv(V, PART)
    table = settings.table(R, device)
    if uniforms is None:
        uniforms = torch.zeros(R, dtype=torch.float64, device=device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    part = empty(R, n_parts), empty(R, n_parts), empty(R, n_parts, dtype=torch.int32)  # max, sum, first
    cells = empty(R, n_parts, BINS, dtype=torch.int32), empty(R, n_parts, BINS)
    n, total = empty(R, dtype=torch.int32), empty(R, n_parts, dtype=torch.int64)
    room = CANDIDATES if settings.truncates else 0
    listed = empty(R, room), empty(R, room, dtype=torch.int32)
    token, logprob, summary = empty(R, dtype=torch.int64), empty(R), empty(R, 5)
    top = empty(R, top_logprobs, dtype=torch.int64), empty(R, top_logprobs)
    if not R:
        return Sampled(token, logprob, *top)
    with torch.cuda.device_of(x):
        strides = (x.stride(0), V, n_parts)
        _part[(R, n_parts)](
            x, counts, table, *part, *cells, *strides, HISTOGRAM=settings.truncates, b_V=PART, b_B=BINS, num_warps=8,
        )  # fmt: skip
        if settings.truncates:
            _gather[(R, n_parts)](
                x, counts, table, *part[:2], *cells, n, total, *listed, *strides,
                b_V=PART, b_P=PARTS, b_B=BINS, b_L=CANDIDATES, num_warps=8,
            )  # fmt: skip
        _choose[(R,)](
            x, counts, table, *part, n, total, *listed, uniforms.contiguous(), token, logprob, summary, *strides,
            TRUNCATE=settings.truncates, b_V=PART, b_P=PARTS, b_L=CANDIDATES, b_T=TILE, num_warps=16,
        )  # fmt: skip
        if logprobs_of == "raw":
            counts, table = None, Settings().table(R, device)
            _part[(R, n_parts)](
                x, None, table, *part, *cells, *strides, HISTOGRAM=False, b_V=PART, b_B=BINS, num_warps=8,
            )  # fmt: skip
            _raw[(R,)](x, *part[:2], token, logprob, summary, x.stride(0), n_parts, b_P=PARTS, num_warps=1)
        if top_logprobs:
            keys, tokens = (empty(R, n_parts, top_logprobs, dtype=torch.int32) for _ in range(2))
            _top_part[(R, n_parts)](
                x, counts, table, keys, tokens, *strides, top_logprobs, b_V=PART, num_warps=8,
            )  # fmt: skip
            _top_join[(R,)](
                keys, tokens, summary, *top, n_parts, top_logprobs, b_N=TOP_OF_PARTS, num_warps=8,
            )  # fmt: skip
    return Sampled(token, logprob, *top)


def uniforms(seeds: Tensor, positions: Tensor, count: int = 1) -> Tensor:
    """``accel.kernels.sampling.uniforms`` on a GPU: bit for bit the reference's."""
    out = torch.empty(len(seeds), count, dtype=torch.float64, device=seeds.device)
    if out.numel():
        with torch.cuda.device_of(seeds):
            _uniforms[(triton.cdiv(out.numel(), 256),)](
                seeds.contiguous(), positions.contiguous(), out, count, out.numel(), b_N=256, num_warps=4,
            )  # fmt: skip
    return out


def builds() -> Iterator[Build]:
    """Every configuration that the functions above launch."""
    part = {"p_max": "*fp32", "p_sum": "*fp32", "p_first": "*i32"}
    cells = {"p_bin_count": "*i32", "p_bin_sum": "*fp32"}
    lists = {"p_n": "*i32", "p_total": "*i64", "p_list_x": "*fp32", "p_list_v": "*i32"}
    strides = {"stride_x": "i64", "V": "i32", "n_parts": "i32"}
    chosen = {"p_token": "*i64", "p_logprob": "*fp32", "p_summary": "*fp32"}

    def build(kernel, config, types, constants, num_warps=8):
        """A pointer that the types leave out is None."""
        absent = {name: None for name in kernel.arg_names if name not in types and name not in constants}
        constants = constants | absent
        return Build("sampling", kernel, config, types, constants, divisible=("stride_x",), num_warps=num_warps)

    for dtype in ("bf16", "fp16", "fp32"):
        for counted in (False, True):
            row = {"p_x": f"*{dtype}", "p_settings": "*fp32"} | ({"p_counts": "*i32"} if counted else {})
            name = f"{dtype} penalised" if counted else dtype
            sizes = {"b_V": PART, "b_P": PARTS, "b_L": CANDIDATES}
            for truncate in (False, True):
                config = f"{name} truncated" if truncate else name
                constants = {"HISTOGRAM": truncate, "b_V": PART, "b_B": BINS}
                yield build(_part, config, row | part | cells | strides, constants)
                types = row | part | lists | {"p_uniform": "*fp64"} | chosen | strides
                yield build(_choose, config, types, {"TRUNCATE": truncate, **sizes, "b_T": TILE}, num_warps=16)
            types = row | {"p_max": "*fp32", "p_sum": "*fp32"} | cells | lists | strides
            yield build(_gather, name, types, {**sizes, "b_B": BINS})
            types = row | {"p_key": "*i32", "p_token": "*i32"} | strides | {"n": "i32"}
            yield build(_top_part, name, types, {"b_V": PART})
        types = {"p_x": f"*{dtype}", "p_max": "*fp32", "p_sum": "*fp32", **chosen, "stride_x": "i64", "n_parts": "i32"}
        yield build(_raw, dtype, types, {"b_P": PARTS}, num_warps=1)
    types = {"p_key": "*i32", "p_part_token": "*i32", **chosen, "n_parts": "i32", "n": "i32"}
    yield build(_top_join, "fp32", types, {"b_N": TOP_OF_PARTS})
    types = {"p_seed": "*i64", "p_position": "*i64", "p_uniform": "*fp64", "n_columns": "i32", "n": "i32"}
    yield build(_uniforms, "fp64", types, {"b_N": 256}, num_warps=4)
