"""Triton kernels of the unmask family: certainty in one reading of the logits, and the commit rules by rank.

Certainty splits a position's vocabulary over several programs, because a block has few positions (32, say) and a GPU
many processors; a second kernel joins the parts. Equations and numbers are in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.ahead_of_time import Build
from accel.kernels.unmask.reference import Certainty

# logits a program reads at a time, and the parts of one position's vocabulary that a GPU is filled with
TILE = 2048
PARTS = 64
# positions of a row ranked by one program, and rivals it looks at at a time
RANKED = 64
RIVALS = 64


@triton.jit
def _certainty_part(p_x, p_part, p_token, stride_n, V, forbidden, part_size, n_parts, b_V: tl.constexpr):
    """Part i_p of position i_n: maximum m, Σ e^(x−m), Σ (x−m) e^(x−m) and the first index of the maximum."""
    i_n, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = i_p * part_size
    end = tl.minimum(start + part_size, V)
    o_v = tl.arange(0, b_V)
    # one running maximum a lane: lanes are joined once, at the end
    m = tl.full((b_V,), float("-inf"), tl.float32)
    total = tl.zeros((b_V,), tl.float32)
    weighted = tl.zeros((b_V,), tl.float32)
    token = tl.full((b_V,), 2147483647, tl.int32)
    for tile in range(0, part_size, b_V):
        v = start + tile + o_v
        x = tl.load(p_x + i_n * stride_n + v, mask=(v < end) & (v != forbidden), other=float("-inf")).to(tl.float32)
        larger = x > m
        m_new = tl.where(larger, x, m)
        # -inf − -inf is chosen away: a lane that has seen only -inf keeps sums of zero
        shift = tl.where(m > float("-inf"), m - m_new, 0.0)
        step = tl.where(x > float("-inf"), x - m_new, 0.0)
        e = tl.where(x > float("-inf"), tl.exp(step), 0.0)
        rest = tl.exp(shift)
        weighted = rest * (weighted + shift * total) + e * step
        total = rest * total + e
        token = tl.where(larger, v, token)
        m = m_new
    # join the lanes
    m_all = tl.max(m, 0)
    shift = tl.where(m > float("-inf"), m - m_all, 0.0)
    e = tl.where(m > float("-inf"), tl.exp(shift), 0.0)
    p_here = p_part + (i_n * n_parts + i_p) * 3
    tl.store(p_here, m_all)
    tl.store(p_here + 1, tl.sum(e * total, 0))
    tl.store(p_here + 2, tl.sum(e * (weighted + shift * total), 0))
    tl.store(p_token + i_n * n_parts + i_p, tl.min(tl.where(m == m_all, token, 2147483647), 0))


@triton.jit
def _certainty_join(p_part, p_part_token, p_token, p_probability, p_entropy, n_parts, b_part: tl.constexpr):
    """Join the parts of position i_n: p_max = 1 / Z and H = ln Z − Σ (x−m) e^(x−m) / Z, with Z = Σ e^(x−m)."""
    i_n = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, b_part)
    inside = o_p < n_parts
    p_here = p_part + (i_n * n_parts + o_p) * 3
    m = tl.load(p_here, mask=inside, other=float("-inf"))
    total = tl.load(p_here + 1, mask=inside, other=0.0)
    weighted = tl.load(p_here + 2, mask=inside, other=0.0)
    token = tl.load(p_part_token + i_n * n_parts + o_p, mask=inside, other=2147483647)
    m_all = tl.max(m, 0)
    shift = tl.where(m > float("-inf"), m - m_all, 0.0)
    e = tl.where(m > float("-inf"), tl.exp(shift), 0.0)
    z = tl.sum(e * total, 0)
    s = tl.sum(e * (weighted + shift * total), 0)
    first = tl.min(tl.where((m == m_all) & inside, token, 2147483647), 0)
    # all -inf: no maximum was ever larger, z is 0 and both figures become NaN by 0 / 0
    tl.store(p_token + i_n, tl.where(z > 0, first, 0).to(tl.int64))
    tl.store(p_probability + i_n, tl.where(z > 0, 1.0 / z, float("nan")))
    tl.store(p_entropy + i_n, tl.where(z > 0, tl.log(z) - s / z, float("nan")))


@triton.jit
def _commit(
    p_doubt, p_masked, p_count, p_commit, L, limit,
    NEGATE: tl.constexpr, BY_COUNT: tl.constexpr, STRICT: tl.constexpr, b_L: tl.constexpr, b_R: tl.constexpr,
):  # fmt: skip
    """Positions i_l of row i_b: committed where the rule holds or the rank among the row's candidates is low."""
    i_b, i_l = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_l = i_l * b_L + tl.arange(0, b_L)
    candidate = tl.load(p_masked + i_b * L + o_l, mask=o_l < L, other=0) != 0
    doubt = tl.load(p_doubt + i_b * L + o_l, mask=o_l < L, other=0.0)
    if NEGATE:
        doubt = -doubt
    rank = tl.zeros((b_L,), tl.int32)
    for tile in range(0, L, b_R):
        o_r = tile + tl.arange(0, b_R)
        rival = tl.load(p_masked + i_b * L + o_r, mask=o_r < L, other=0) != 0
        theirs = tl.load(p_doubt + i_b * L + o_r, mask=o_r < L, other=0.0)
        if NEGATE:
            theirs = -theirs
        before = (theirs[None, :] < doubt[:, None]) | (
            (theirs[None, :] == doubt[:, None]) & (o_r[None, :] < o_l[:, None])
        )
        rank += tl.sum((before & rival[None, :]).to(tl.int32), 1)
    if BY_COUNT:
        chosen = rank < tl.load(p_count + i_b)
    elif STRICT:
        chosen = (rank == 0) | (doubt < limit)
    else:
        chosen = (rank == 0) | (doubt <= limit)
    tl.store(p_commit + i_b * L + o_l, (candidate & chosen).to(tl.int8), mask=o_l < L)


def certainty(logits: Tensor, *, forbidden: int | None = None) -> Certainty:
    """``accel.kernels.unmask.certainty`` for logits [..., V] on a GPU."""
    shape, V = logits.shape[:-1], logits.shape[-1]
    x = logits.reshape(-1, V)
    x = x if x.stride(-1) == 1 else x.contiguous()
    N, device = len(x), x.device
    token = torch.empty(N, dtype=torch.int64, device=device)
    probability, entropy = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    if N:
        part_size = max(TILE, triton.cdiv(triton.cdiv(V, PARTS), TILE) * TILE)
        n_parts = triton.cdiv(V, part_size)
        part = torch.empty(N, n_parts, 3, dtype=torch.float32, device=device)
        part_token = torch.empty(N, n_parts, dtype=torch.int32, device=device)
        with torch.cuda.device_of(x):
            _certainty_part[(N, n_parts)](
                x, part, part_token, x.stride(0), V, -1 if forbidden is None else forbidden, part_size, n_parts,
                b_V=TILE, num_warps=8,
            )  # fmt: skip
            _certainty_join[(N,)](part, part_token, token, probability, entropy, n_parts, b_part=PARTS, num_warps=1)
    return Certainty(token.view(shape), probability.view(shape), entropy.view(shape))


def commit(
    certainty: Certainty,
    masked: Tensor,
    *,
    rule: str,
    threshold: float | None = None,
    count: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """``accel.kernels.unmask.commit`` on a GPU; no value is brought to the host."""
    B, L = masked.shape
    by_entropy = rule.endswith("entropy")
    doubt = (certainty.entropy if by_entropy else certainty.probability).contiguous()
    chosen = torch.empty(B, L, dtype=torch.bool, device=masked.device)
    limit = 0.0 if threshold is None else (threshold if by_entropy else -threshold)
    if chosen.numel():
        with torch.cuda.device_of(masked):
            _commit[(B, triton.cdiv(L, RANKED))](
                doubt, masked.contiguous().view(torch.int8), count, chosen.view(torch.int8), L, limit,
                NEGATE=not by_entropy, BY_COUNT=count is not None, STRICT=strict, b_L=RANKED, b_R=RIVALS, num_warps=4,
            )  # fmt: skip
    return chosen


def builds() -> Iterator[Build]:
    """Every configuration that the functions above launch."""
    for dtype in ("bf16", "fp16", "fp32"):
        types = {
            "p_x": f"*{dtype}", "p_part": "*fp32", "p_token": "*i32", "stride_n": "i64", "V": "i32",
            "forbidden": "i32", "part_size": "i32", "n_parts": "i32",
        }  # fmt: skip
        yield Build("unmask", _certainty_part, dtype, types, {"b_V": TILE}, divisible=("stride_n",), num_warps=8)
    types = {
        "p_part": "*fp32", "p_part_token": "*i32", "p_token": "*i64", "p_probability": "*fp32", "p_entropy": "*fp32",
        "n_parts": "i32",
    }  # fmt: skip
    yield Build("unmask", _certainty_join, "fp32", types, {"b_part": PARTS}, num_warps=1)
    for rule, by_count, strict in (("top_k", True, False), ("≤", False, False), ("<", False, True)):
        for negate in (False, True):
            types = {"p_doubt": "*fp32", "p_masked": "*i8", "p_commit": "*i8", "L": "i32", "limit": "fp32"}
            constants: dict[str, int | None] = {
                "NEGATE": negate,
                "BY_COUNT": by_count,
                "STRICT": strict,
                "b_L": RANKED,
                "b_R": RIVALS,
            }
            if by_count:
                types["p_count"] = "*i64"
            else:
                constants["p_count"] = None
            name = f"{rule} by {'probability' if negate else 'entropy'}"
            yield Build("unmask", _commit, name, types, constants)
