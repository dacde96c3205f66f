"""Cosine similarity and the k largest, a stretch of the store at a time: the plain statement, also the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# scores made at a time: 16 MiB, whatever the store's size
SCORES = 2**22


class Neighbours(NamedTuple):
    """``scores`` fp32 [Q, k] and ``indices`` int64 [Q, k], best first; −inf and −1 where there are no more rows."""

    scores: Tensor
    indices: Tensor


def inverse_norm(x: Tensor) -> Tensor:
    """x [N, D] → 1 / |x| fp32 [N], and 0 for a zero vector, whose similarity then is 0."""
    norm = x.to(_accurate(x)).square().sum(-1).sqrt()
    return torch.where(norm > 0, 1 / norm, 0).float()


def top_k(
    queries: Tensor,
    store: Tensor,
    k: int,
    *,
    normalized: bool = False,
    inverse_norms: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Neighbours:
    """queries [Q, D], store [N, D] → Neighbours [Q, k]; see ``accel.kernels.similarity.top_k``."""
    Q, N = len(queries), len(store)
    accurate = queries.to(_accurate(queries))
    scale = None if normalized else inverse_norm(queries)[:, None]
    best = torch.empty(Q, 0, dtype=torch.int64, device=store.device)
    size = max(k, SCORES // max(Q, 1))
    for start in range(0, N, size):
        x = store[start : start + size]
        scores = (accurate @ x.to(accurate.dtype).T).float()
        if scale is not None:
            of_store = inverse_norm(x) if inverse_norms is None else inverse_norms[start : start + size]
            scores = scores * of_store * scale
        key = _key(scores, torch.arange(start, start + len(x), device=store.device))
        if exclude is not None:
            key = key.masked_fill(exclude[..., start : start + size], _NOTHING)
        best = torch.cat([best, key], 1)
        best = best.topk(min(k, best.shape[1])).values
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=_NOTHING)
    nothing = best == _NOTHING
    scores, indices = _read(best)
    return Neighbours(scores.masked_fill(nothing, -torch.inf), indices.masked_fill(nothing, -1))


# below the key of any score
_NOTHING = -(2**63)


def _key(scores: Tensor, indices: Tensor) -> Tensor:
    """scores fp32 [Q, n], indices [n] → int64 [Q, n] in the order of the scores, and of equals the lower index larger.

    torch.topk does not promise which of several equal scores it takes; keys are never equal.
    """
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    # two's complement orders floats but for the negative ones, which run backwards
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (0xFFFFFFFF - indices)


def _read(key: Tensor) -> tuple[Tensor, Tensor]:
    """What ``_key`` packed."""
    ordered = (key >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32), 0xFFFFFFFF - (key & 0xFFFFFFFF)


def _accurate(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what products are summed in."""
    return torch.promote_types(x.dtype, torch.float32)
