"""Prefix attention: new positions of each row over shared segments plus the row's own tail (README.md).

Knows positions, lengths and who reads which segment. Does not know models, caches or layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.kernels.device import runs_triton, wants_gradient
from accel.kernels.prefix_attention import reference
from accel.kernels.prefix_attention.reference import Plan, SharedKV, plan

__all__ = ["Plan", "SharedKV", "plan", "prefix_attention"]

# what the Triton path takes; anything else runs the reference
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_HEAD_DIM = 256


def prefix_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    segments: Sequence[SharedKV] = (),
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention over every segment of a row and its tail.

    query [R, H, n, D], keys [R, Hkv, L, D], values [R, Hkv, L, Dv] → [R, H, n, Dv]; segments [Hkv, P, D], [Hkv, P, Dv]
    and, where they have one, a bias [Hkv, P]

    H is a multiple of Hkv. Tails hold the n new positions and are right-padded, with anything finite (the Triton path
    never reads the padding). ``plan`` is the step's, made for the same R, n and L. ``softcap`` c turns a score x into
    c · tanh(x / c); a segment's bias is added to what that gives.
    """
    q, k, v = query.shape, keys.shape, values.shape
    if len(q) != 4 or len(k) != 4 or k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"query {list(q)}, keys {list(k)}, values {list(v)}: they must be [R, H, n, D], [R, Hkv, L, D] and "
            "[R, Hkv, L, Dv], H a multiple of Hkv"
        )
    if (len(plan.starts), plan.n, plan.tail_length) != (q[0], q[2], k[2]):
        raise ValueError(
            f"the plan is for R={len(plan.starts)}, n={plan.n}, L={plan.tail_length}, query and keys have R={q[0]}, "
            f"n={q[2]}, L={k[2]}: make a plan for this step"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: must be > 0, or None for none")
    for s in segments:
        if s.bias is not None and (s.bias.shape != (k[1], s.keys.shape[1]) or s.bias.dtype != torch.float32):
            raise ValueError(
                f"bias {list(s.bias.shape)} in {s.bias.dtype}: must be [Hkv, P] = {[k[1], s.keys.shape[1]]} in "
                "torch.float32, a number for each slot of the segment, or None for none"
            )
    if (
        runs_triton(query)
        and query.dtype in TRITON_DTYPES
        and max(q[3], v[3]) <= TRITON_MAX_HEAD_DIM
        and not wants_gradient(query, keys, values, *(t for s in segments for t in (s.keys, s.values, s.bias)))
    ):
        from accel.kernels.prefix_attention import triton

        return triton.prefix_attention(query, keys, values, plan, segments, scale=scale, softcap=softcap)
    return reference.prefix_attention(query, keys, values, plan, segments, scale=scale, softcap=softcap)
