"""Attention of a few new positions a row over shared immutable segments and the row's own tail, in plain PyTorch.

Also the CPU path. A step's masks do not depend on the layer, so they are planned once (``plan``) and run for every
layer (``prefix_attention``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SharedKV:
    """One immutable segment in one layer and the rows (indices into the batch) that read it.

    ``keys``, ``values``: ``[Hkv, P, D]``, keys already rotated. ``first_position``: position of its first key.
    ``bias``: fp32 ``[Hkv, P]``, added to every query's score of a slot, after scale and soft cap: a slot with bias b
    weighs as much as exp(b) slots like it, one with -inf nothing. Its other values are finite.
    """

    keys: Tensor
    values: Tensor
    rows: tuple[int, ...]
    first_position: int
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Who sees which tail key, for one step and one window size.

    Row r's query i stands behind ``starts[r] + i`` tail keys and at position ``first_query_positions[r] + i``.
    ``tail_length``: L, the longest row's. ``causal``: the step is a fresh prefill (n == L), so that SDPA's own causal
    mask says the same as ``mask`` without being built.
    """

    n: int
    tail_length: int
    starts: tuple[int, ...]
    first_query_positions: tuple[int, ...]
    window: int | None
    causal: bool
    device: torch.device
    dtype: torch.dtype
    # what a path works out once a step and needs again in every layer
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def mask(self) -> Tensor | None:
        """Additive ``[R, 1, n, L]``, or None where ``causal`` says it all or every query sees all L tail keys.

        Only the reference reads it: kernels go by ``starts``, and the mask of a long prefill would not fit.
        """
        windowed = self.window is not None and self.tail_length > self.window
        if self.causal or (not windowed and self.n == 1 and min(self.starts) == max(self.starts)):
            return None
        query = torch.tensor(self.starts, device=self.device)[:, None] + torch.arange(self.n, device=self.device)
        key = torch.arange(self.tail_length, device=self.device)
        hidden = key > query[..., None]  # [R, n, L]
        if self.window is not None:
            hidden |= key <= query[..., None] - self.window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        return mask[:, None]


# Reading bytes in one call more costs about as much as reading so many: rows of a batch whose tails differ by more are
# read in groups, each as far as its own longest tail.
BYTES_OF_A_CALL = 300_000


def groups(lengths: Sequence[int], token_bytes: int) -> list[tuple[int, int]]:
    """Neighbouring rows that are read together, as (first, behind the last): the cheapest way to part them.

    A group costs a call, and its longest tail for every one of its rows.
    """
    call = BYTES_OF_A_CALL / token_bytes
    # least cost of the rows before i, and where its last group begins
    best = [(0.0, 0)]
    for end in range(1, len(lengths) + 1):
        longest, options = 0, []
        for first in range(end - 1, -1, -1):
            longest = max(longest, lengths[first])
            options.append((best[first][0] + call + longest * (end - first), first))
        best.append(min(options))
    found, end = [], len(lengths)
    while end:
        found.append((best[end][1], end))
        end = best[end][1]
    return found[::-1]


def plan(
    starts: Sequence[int],
    n: int,
    offsets: Sequence[int],
    *,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """Plan one step: row r holds ``starts[r]`` tail tokens and now adds n, its tail begins at position ``offsets[r]``.

    Query i of row r sees tail key j where ``j <= starts[r] + i`` and, with a window w, ``j > starts[r] + i - w``
    (transformers' sliding-window rule; positions inside a tail are contiguous, so index differences suffice).
    """
    length = max(starts) + n
    first = tuple(offset + start for offset, start in zip(offsets, starts, strict=True))
    windowed = window is not None and length > window
    causal = n > 1 and not windowed and not any(starts)
    return Plan(n, length, tuple(starts), first, window, causal, device, dtype)


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
    """query [R, H, n, D], keys [R, Hkv, L, D], values [R, Hkv, L, Dv] → [R, H, n, Dv]; see the public function."""
    if segments or softcap is not None:
        return _merged(query, keys, values, plan, segments, scale, softcap)
    rows, heads, n, _ = query.shape
    repeats = heads // keys.shape[1]
    if plan.causal:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    # Folding a group's heads into the query axis lets them share their key head without repeating it:
    # the copy that repeating makes would grow with the context at every step.
    folded = query.reshape(rows, keys.shape[1], repeats * n, query.shape[-1])
    mask = None if plan.mask is None else _fold_mask(plan.mask, repeats)
    parts = []
    for first, end, length in _parts(plan, keys):
        seen = None if mask is None else mask[first:end, ..., :length]
        k, v = keys[first:end, :, :length], values[first:end, :, :length]
        parts.append(F.scaled_dot_product_attention(folded[first:end], k, v, attn_mask=seen, scale=scale))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(rows, heads, n, values.shape[-1])


def _parts(plan: Plan, keys: Tensor) -> list[tuple[int, int, int]]:
    """Groups of rows and the tail that each of them reads; one for all where no row is longer than the others."""
    lengths = [start + plan.n for start in plan.starts]
    if min(lengths) == max(lengths) or keys.device.type != "cpu":
        return [(0, len(lengths), plan.tail_length)]
    token_bytes = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
    key = ("parts", token_bytes)
    if key not in plan.derived:
        plan.derived[key] = [(a, b, max(lengths[a:b])) for a, b in groups(lengths, token_bytes)]
    found: list[tuple[int, int, int]] = plan.derived[key]
    return found


def _fold_mask(mask: Tensor, groups: int) -> Tensor:
    """[R, 1, n, L] → [R, 1, groups · n, L], the mask repeated for every head of a group."""
    rows, _, n, length = mask.shape
    return mask[:, :, None].expand(rows, 1, groups, n, length).reshape(rows, 1, groups * n, length)


def _merged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    segments: Sequence[SharedKV],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One softmax over several key sets: each gives (out, lse); lse weighs them together."""
    rows, heads, n, dim = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(rows, kv_heads, groups * n, dim).float()
    mask = plan.mask
    if plan.causal:
        mask = torch.full((n, n), -math.inf, device=query.device).triu_(1).expand(rows, 1, n, n)
    out, lse = _attend(folded, keys, values, None if mask is None else _fold_mask(mask, groups), scale, softcap)
    for segment in segments:
        index = torch.tensor(segment.rows, device=query.device)
        chosen = folded[index]  # [S, Hkv, groups · n, D]
        hidden = _segment_mask(plan, segment, groups, query.device)
        # every row that reads the segment joins one query matrix, so its keys are read once for all of them
        flat = chosen.transpose(0, 1).reshape(1, kv_heads, -1, dim)
        seg_out, seg_lse = _attend(flat, segment.keys[None], segment.values[None], hidden, scale, softcap, segment.bias)
        seg_out = seg_out.view(kv_heads, len(segment.rows), groups * n, -1).transpose(0, 1)
        seg_lse = seg_lse.view(kv_heads, len(segment.rows), groups * n, 1).transpose(0, 1)
        total = torch.logaddexp(lse[index], seg_lse)
        merged = out[index] * (lse[index] - total).exp() + seg_out * (seg_lse - total).exp()
        out, lse = out.index_copy(0, index, merged), lse.index_copy(0, index, total)
    return out.to(query.dtype).reshape(rows, heads, n, values.shape[-1])


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[R, Hkv, Q, D] × [R, Hkv, L, D], bias [Hkv, L] → out [R, Hkv, Q, Dv] and log-sum-exp [R, Hkv, Q, 1], in fp32.

    A query that sees nothing gets 0 and -inf.
    """
    scores = query @ keys.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias[:, None]
    if mask is not None:
        scores = scores + mask
    if scores.requires_grad and (bias is not None or mask is not None):
        # logsumexp of nothing but -inf is right, its gradient is NaN
        unseen = (scores == -math.inf).all(-1, keepdim=True)
        lse = scores.masked_fill(unseen, 0.0).logsumexp(-1, keepdim=True).masked_fill(unseen, -math.inf)
    else:
        lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    return weights @ values.float(), lse


def _segment_mask(plan: Plan, segment: SharedKV, groups: int, device: torch.device) -> Tensor | None:
    """Additive ``[1, 1, S · groups · n, P]`` for a sliding window over a segment; None without a window."""
    if plan.window is None:
        return None
    first = torch.tensor([plan.first_query_positions[r] for r in segment.rows], device=device)
    position = first[:, None] + torch.arange(plan.n, device=device)  # [S, n]
    key = segment.first_position + torch.arange(segment.keys.shape[1], device=device)
    hidden = key <= position[..., None] - plan.window  # [S, n, P]
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)
    return mask[:, None].expand(-1, groups, -1, -1).reshape(1, 1, -1, segment.keys.shape[1])
