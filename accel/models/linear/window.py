"""The softmax over the last w tokens that some linear layers add under the same denominator (LAWCAT's hybrid).

Numerator and denominator apart, exponents less the row's own largest score. Blocks of queries read their w - 1 keys
before them: the cost is linear in the length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accel.models.linear.layer import LinearAttention
    from accel.models.linear.memory import Projected

# queries at a time: more of them waste more of a block's scores, fewer are more calls
BLOCK = 64


class WindowState(NamedTuple):
    """Rotated keys and values of the last w - 1 tokens, oldest first [B, w-1, Hkv, D], and which are there, bool."""

    k: Tensor
    v: Tensor
    there: Tensor

    @classmethod
    def empty(cls, rows: int, k: Tensor, v: Tensor, window: int) -> WindowState:
        shape = (rows, window - 1, *k.shape[-2:])
        return cls(k.new_zeros(shape), v.new_zeros(shape), k.new_zeros(shape[:2], dtype=torch.bool))


def window_terms(
    layer: LinearAttention,
    x: Projected,
    before: WindowState | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], WindowState]:
    """Σ e v [B, T, H, D] and Σ e [B, T, H] in fp32 over each query's last w tokens, and the window after.

    e = exp(q·k / √D - the largest of the row). ``mask``, ``cu_seqlens``: see ``memory.attend``.
    """
    assert x.rotated_q is not None and x.rotated_k is not None
    q, k, v, window = x.rotated_q, x.rotated_k, x.v, layer.spec.window
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    if before is None:
        before = WindowState.empty(len(q) if bounds is None else len(bounds) - 1, k, v, window)
    there = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    if bounds is None:
        return _dense(q, k, v, there, before, window)
    numerators, denominators, states = [], [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        own = WindowState(*(each[n : n + 1] for each in before))
        at = slice(start, end)
        (numerator, denominator), after = _dense(q[:, at], k[:, at], v[:, at], there[:, at], own, window)
        numerators.append(numerator)
        denominators.append(denominator)
        states.append(after)
    terms = torch.cat(numerators, 1), torch.cat(denominators, 1)
    return terms, WindowState(*(torch.cat(each) for each in zip(*states, strict=True)))


def _dense(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, before: WindowState, window: int
) -> tuple[tuple[Tensor, Tensor], WindowState]:
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = torch.cat([before.k, k], 1), torch.cat([before.v, v], 1)
    there = torch.cat([before.there, there], 1)
    after = WindowState(*(each[:, T:].clone() for each in (k, v, there)))
    numerators, denominators = [], []
    for start in range(0, T, BLOCK):
        queries = q[:, start : start + BLOCK].float()
        n = queries.shape[1]
        # query i of the block stands at key i + w - 1 of the slice
        keys, values, seen = (each[:, start : start + n + window - 1] for each in (k, v, there))
        keys, values = (each.float().repeat_interleave(group, dim=2) for each in (keys, values))
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) * q.shape[-1] ** -0.5
        place = torch.arange(keys.shape[1], device=q.device) - torch.arange(n, device=q.device)[:, None]
        allowed = ((place >= 0) & (place < window)) & seen[:, None, None, :]
        scores = scores.masked_fill(~allowed, float("-inf"))
        # a padded query sees nothing: its largest is -inf, and -inf less itself is no number
        largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        weights = (scores - largest).exp()
        numerators.append(torch.einsum("bhts,bshd->bthd", weights, values))
        denominators.append(weights.sum(-1).transpose(1, 2))
    if not numerators:
        return (q[..., : v.shape[-1]].float(), q[..., 0].float()), after
    return (torch.cat(numerators, 1), torch.cat(denominators, 1)), after
