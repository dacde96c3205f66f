"""The softmax over the last w tokens that some linear layers add under the same denominator (LAWCAT's hybrid).

Numerator and denominator apart, exponents less the row's own largest score. Blocks of queries read their w - 1 keys
before them: the cost is linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Rotated keys and values of the last m tokens, oldest first [B, m, Hkv, D], and which are there, bool [B, m].

    m is w - 1, or w where a token enters the linear term as it leaves the window.
    """

    k: Tensor
    v: Tensor
    there: Tensor

    @classmethod
    def empty(cls, rows: int, k: Tensor, v: Tensor, length: int) -> WindowState:
        shape = (rows, length, *k.shape[-2:])
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
    assert x.rotated_q is not None
    keys, before, bounds = _behind(layer, x, before, mask, cu_seqlens)
    k, v, there = keys
    terms = [
        _dense(x.rotated_q[rows, at], k[rows, at], v[rows, at], there[rows, at], own, layer.spec.window)
        for rows, at, own in _sequences(before, bounds)
    ]
    numerators, denominators, after = zip(*terms, strict=True)
    if bounds is None:
        return (numerators[0], denominators[0]), after[0]
    states = WindowState(*(torch.cat(each) for each in zip(*after, strict=True)))
    return (torch.cat(numerators, 1), torch.cat(denominators, 1)), states


def delayed(
    layer: LinearAttention,
    x: Projected,
    before: WindowState | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each token the one that leaves its window: rotated key, value [B, T, Hkv, D], and whether there is one."""
    keys, before, bounds = _behind(layer, x, before, mask, cu_seqlens)
    pieces = [
        [torch.cat([old, new[rows, at]], 1)[:, : new[rows, at].shape[1]] for old, new in zip(own, keys, strict=True)]
        for rows, at, own in _sequences(before, bounds)
    ]
    k, v, there = (torch.cat(each, 1) for each in zip(*pieces, strict=True))
    return k, v, there


def _behind(
    layer: LinearAttention, x: Projected, before: WindowState | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], WindowState, list[int] | None]:
    """New keys, values and which are there; what stands before them; the bounds of packed sequences on the host."""
    assert x.rotated_k is not None
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    if before is None:
        rows = len(x.q) if bounds is None else len(bounds) - 1
        before = WindowState.empty(rows, x.rotated_k, x.v, layer.spec.remembered)
    there = torch.ones(x.q.shape[:2], dtype=torch.bool, device=x.q.device) if mask is None else mask
    return (x.rotated_k, x.v, there), before, bounds


def _sequences(before: WindowState, bounds: list[int] | None) -> Iterator[tuple[slice, slice, WindowState]]:
    """Rows, tokens and memory of each packed sequence, or of the whole batch at once."""
    everything = slice(None)
    if bounds is None:
        yield everything, everything, before
        return
    for n, (start, end) in enumerate(pairwise(bounds)):
        own = WindowState(before.k[n : n + 1], before.v[n : n + 1], before.there[n : n + 1])
        yield everything, slice(start, end), own


def _dense(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, before: WindowState, window: int
) -> tuple[Tensor, Tensor, WindowState]:
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = torch.cat([before.k, k], 1), torch.cat([before.v, v], 1)
    there = torch.cat([before.there, there], 1)
    after = WindowState(*(each[:, T:].clone() for each in (k, v, there)))
    # the oldest one may be there for the linear term alone
    k, v, there = (each[:, before.k.shape[1] - (window - 1) :] for each in (k, v, there))
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
        return q.float(), q[..., 0].float(), after
    return torch.cat(numerators, 1), torch.cat(denominators, 1), after
