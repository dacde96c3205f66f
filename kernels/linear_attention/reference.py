"""Normalised gated linear attention in plain PyTorch: the recurrence, its chunked form, the step and the replay.

``recurrent`` is the equation (README.md), one token at a time. ``chunked`` computes the same sixteen tokens at a time
or, where nothing is forgotten fast, up to sixty-four, and is what runs on a CPU. Both take [B, T, heads, …] without
packing; the functions below them add the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16
# Chunks that forget at most e^MILD are two products, the longest of these that does so: a decay between two tokens is
# then a quotient, and a sum of 16 rounded to 2^-24 costs 1e-6 of its exponential.
MILD_CHUNKS, MILD = (64, 16), -16.0


class State(NamedTuple):
    """What the tokens so far leave behind, fp32: ``s`` [B, H, K, V] = Σ decayed k vᵀ, ``z`` [B, H, K] = Σ decayed k."""

    s: Tensor
    z: Tensor


@dataclass(frozen=True)
class Replay:
    """Inputs that were read but are not in the state yet: rows 0..length[b] of ``k`` [B, C, Hk, K],
    ``v`` [B, C, Hv, V] and ``log_decay`` fp32 [B, C, Hg, K] (C: the capacity); ``length`` int32 [B]."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    length: Tensor

    @property
    def capacity(self) -> int:
        return self.k.shape[1]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State, scale: float
) -> tuple[Tensor, Tensor, State]:
    """q, k, log_decay [B, T, H, K], v [B, T, H, V], fp32 → numerator [B, T, H, V], denominator [B, T, H], State."""
    s, z = state
    numerator, denominator = torch.empty_like(v), v.new_empty(v.shape[:3])
    for t in range(q.shape[1]):
        a = log_decay[:, t].exp()
        # the new token is not decayed
        s = a[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = a * z + k[:, t]
        numerator[:, t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], s)
        denominator[:, t] = scale * (q[:, t] * z).sum(-1)
    return numerator, denominator, State(s, z)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State, scale: float
) -> tuple[Tensor, Tensor, State]:
    """``recurrent``, by chunks: what the state adds, plus the chunk's own pairs. Exact for any decay.

    Decays between two tokens are sums over just the steps between them: as a difference of running sums, a large
    decay would take the digits of the small ones after it.
    """
    s, z = state
    numerators, denominators = [v[:, :0]], [v[:, :0, :, 0]]
    start = 0
    while start < q.shape[1]:
        mild = next((C for C in MILD_CHUNKS if bool((log_decay[:, start : start + C].sum(1) >= MILD).all())), None)
        if mild is not None:
            q_c, k_c, v_c, g = (x[:, start : start + mild].transpose(1, 2) for x in (q, k, v, log_decay))
            numerator, denominator, (s, z) = _mild_chunk(q_c, k_c, v_c, g, State(s, z), scale)
            numerators.append(numerator)
            denominators.append(denominator)
            start += mild
            continue
        q_c, k_c, v_c, g = (x[:, start : start + CHUNK].transpose(1, 2) for x in (q, k, v, log_decay))
        start += CHUNK
        C = q_c.shape[2]
        # between[i, j] = Σ_{j < u ≤ i} g_u
        later = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)[..., None]
        between = torch.where(later, g[..., :, None, :], 0.0).cumsum(-3)
        pairs = (scale * q_c[..., :, None, :] * k_c[..., None, :, :] * between.exp()).sum(-1).tril()
        seen = scale * q_c * g.cumsum(-2).exp()
        numerators.append((seen @ s + pairs @ v_c).transpose(1, 2))
        denominators.append(((seen * z[..., None, :]).sum(-1) + pairs.sum(-1)).transpose(1, 2))
        # a token's decay to the chunk's end is the last row of `between`
        left = k_c * between[..., -1, :, :].exp()
        whole = g.sum(-2).exp()
        s = whole[..., None] * s + left.transpose(-1, -2) @ v_c
        z = whole * z + left.sum(-2)
    return torch.cat(numerators, 1), torch.cat(denominators, 1), State(s, z)


def _mild_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: State, scale: float) -> tuple[Tensor, Tensor, State]:
    """A chunk [B, H, C, …] as two products: e^{G_i − G_j} = e^{G_i} / e^{G_j}, with G the running sums of g."""
    sums = g.cumsum(-2)
    grown = k * (-sums).exp()
    seen = scale * q * sums.exp()
    pairs = (seen @ grown.transpose(-1, -2)).tril()
    numerator = seen @ state.s + pairs @ v
    denominator = (seen @ state.z[..., None])[..., 0] + pairs.sum(-1)
    whole = sums[..., -1, :].exp()
    s = whole[..., None] * (state.s + grown.transpose(-1, -2) @ v)
    z = whole * (state.z + grown.sum(-2))
    return numerator.transpose(1, 2), denominator.transpose(1, 2), State(s, z)


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
) -> tuple[Tensor, Tensor, State]:
    """See ``accel.kernels.linear_attention``; here the numerator is fp32."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    scale = K**-0.5 if scale is None else scale
    q, k, v, log_decay = (x.float().repeat_interleave(H // x.shape[2], dim=2) for x in (q, k, v, log_decay))
    if min_log_decay is not None:
        log_decay = log_decay.clamp(min=min_log_decay)
    N = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        state = State(q.new_zeros(N, H, K, V), q.new_zeros(N, H, K))
    else:
        state = State(initial_state.s.clone(), initial_state.z.clone())
    if cu_seqlens is None:
        return chunked(q, k, v, log_decay, state, scale)
    numerator, denominator = torch.empty_like(v), v.new_empty(v.shape[:3])
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        q_n, k_n, v_n, g_n = (x[:, start:end] for x in (q, k, v, log_decay))
        num, den, after = chunked(q_n, k_n, v_n, g_n, State(state.s[n : n + 1], state.z[n : n + 1]), scale)
        numerator[:, start:end], denominator[:, start:end] = num, den
        state.s[n], state.z[n] = after.s[0], after.z[0]
    return numerator, denominator, state


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
) -> tuple[Tensor, State]:
    """See ``accel.kernels.linear_attention``."""
    numerator, denominator, state = linear_attention_terms(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        min_log_decay=min_log_decay,
    )
    return (numerator / (denominator + eps)[..., None]).to(q.dtype), state


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
    """See ``accel.kernels.linear_attention``: one token; ``state`` is updated in place."""
    token = (x[:, None] for x in (q, k, v, log_decay))
    out, after = linear_attention(*token, scale=scale, eps=eps, initial_state=state, min_log_decay=min_log_decay)
    state.s.copy_(after.s)
    state.z.copy_(after.z)
    return out[:, 0]


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
    """See ``accel.kernels.linear_attention``."""
    numerator, denominator = replay_terms(q, k, v, log_decay, state, replay, scale=scale, min_log_decay=min_log_decay)
    return (numerator / (denominator + eps)[..., None]).to(q.dtype)


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
    """See ``accel.kernels.linear_attention``; here the numerator is fp32."""
    B, n = q.shape[:2]
    fold(state, replay, room=n)
    if min_log_decay is not None:
        log_decay = log_decay.clamp(min=min_log_decay)
    row = torch.arange(B, device=q.device)[:, None]
    place = replay.length[:, None] + torch.arange(n, device=q.device)
    for buffered, new in ((replay.k, k), (replay.v, v), (replay.log_decay, log_decay)):
        buffered[row, place] = new.to(buffered.dtype)
    # every row from its buffer's start: what lies beyond a row's own inputs comes later and is not looked at
    used = int(replay.length.max()) + n if B else n
    late = q.new_zeros(B, used, *q.shape[2:])
    late[row, place] = q
    inputs = (x[:, :used] for x in _without(replay, replay.length + n))
    numerator, denominator, _ = linear_attention_terms(late, *inputs, scale=scale, initial_state=state)
    return numerator[row, place], denominator[row, place]


def fold(state: State, replay: Replay, *, room: int | None = None) -> None:
    """See ``accel.kernels.linear_attention``."""
    room = replay.capacity if room is None else room
    full = replay.length > replay.capacity - room
    if not full.any():
        return
    inputs = _without(replay, replay.length * full)
    _, _, after = linear_attention_terms(
        inputs[0].new_zeros(*inputs[0].shape[:2], state.z.shape[1], state.z.shape[2]), *inputs, initial_state=state
    )
    state.s.copy_(after.s)
    state.z.copy_(after.z)
    replay.length.mul_(~full)


def _without(replay: Replay, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The buffered inputs with rows from ``end`` [B] on made nothing: key 0 and log decay 0 leave a state as it is."""
    outside = (torch.arange(replay.capacity, device=end.device) >= end[:, None])[..., None, None]
    k, v, log_decay = (x.masked_fill(outside, 0) for x in (replay.k, replay.v, replay.log_decay))
    return k, v, log_decay
