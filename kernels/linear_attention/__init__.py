"""Normalised gated linear attention (LAWCAT): whole sequences, one token, tokens that may be taken back (README.md).

A head keeps a state S [K, V] and its denominator z [K] beside it. Knows queries, keys, values and decays. Does not
know feature maps, convolutions or caches' owners.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.kernels.device import runs_triton, wants_gradient
from accel.kernels.linear_attention import reference
from accel.kernels.linear_attention.reference import Replay, State

__all__ = [
    "Replay",
    "State",
    "fold",
    "keep",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_terms",
    "new_replay",
    "replay_step",
    "replay_terms",
]


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
    """o_t = scale · q_tᵀ S_t / (scale · q_tᵀ z_t + eps); S_t = a_t ∘ S_{t−1} + k_t v_tᵀ, z_t = a_t ∘ z_{t−1} + k_t.

    q [B, T, H, K], k [B, T, Hk, K], v [B, T, Hv, V], log_decay = ln a ≤ 0 [B, T, Hg, K]
    → out [B, T, H, V] of q's dtype, the state after: s [N, H, K, V], z [N, H, K], fp32

    Hk, Hv and Hg divide H; head h reads head h // (H / Hk) of k, and so on. ``scale``: K^-0.5 unless given.
    ``cu_seqlens``: int32 or int64 [N+1], bounds of N sequences packed into B = 1; empty ones keep their state. Without
    it N = B. ``min_log_decay``: steps below it are raised to it; at -4.5 or more the faster kernel runs, and nothing
    else changes. Padding: a position with k = 0 and log_decay = 0 leaves the state as it is.
    """
    _check(q, k, v, log_decay, 4)
    _check_sequences(q, v, initial_state, cu_seqlens)
    _check_floor(min_log_decay)
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "min_log_decay": min_log_decay,
    }
    if runs_triton(q) and not wants_gradient(q, k, v, log_decay):
        from accel.kernels.linear_attention import triton

        return triton.linear_attention(q, k, v, log_decay, eps=eps, **options)
    return reference.linear_attention(q, k, v, log_decay, eps=eps, **options)


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
    """The two sides of ``linear_attention``'s fraction, for hybrids that add a softmax window to both.

    → numerator [B, T, H, V] of q's dtype, denominator fp32 [B, T, H] (both scaled, no eps), the state after
    """
    _check(q, k, v, log_decay, 4)
    _check_sequences(q, v, initial_state, cu_seqlens)
    _check_floor(min_log_decay)
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "min_log_decay": min_log_decay,
    }
    if runs_triton(q) and not wants_gradient(q, k, v, log_decay):
        from accel.kernels.linear_attention import triton

        return triton.linear_attention_terms(q, k, v, log_decay, **options)
    numerator, denominator, state = reference.linear_attention_terms(q, k, v, log_decay, **options)
    return numerator.to(q.dtype), denominator, state


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
    """One token of every row; ``state`` is updated in place.

    q [B, H, K], k [B, Hk, K], v [B, Hv, V], log_decay [B, Hg, K], state of B rows → out [B, H, V] of q's dtype
    """
    _check(q, k, v, log_decay, 3)
    _check_state(state, "state", (len(q), q.shape[1], q.shape[2], v.shape[2]), q.device)
    _check_floor(min_log_decay)
    if runs_triton(q):
        from accel.kernels.linear_attention import triton

        return triton.linear_attention_step(
            q, k, v, log_decay, state, scale=scale, eps=eps, min_log_decay=min_log_decay
        )
    return reference.linear_attention_step(q, k, v, log_decay, state, scale=scale, eps=eps, min_log_decay=min_log_decay)


def new_replay(k: Tensor, v: Tensor, log_decay: Tensor, capacity: int) -> Replay:
    """An empty buffer for ``capacity`` tokens a row, of the rows, heads, widths and types of one step's inputs.

    k [B, n, Hk, K], v [B, n, Hv, V], log_decay [B, n, Hg, K] → Replay
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a replay buffer holds at least 1 token; 16 to 32 suit most drafts")
    B = len(k)
    return Replay(
        k.new_zeros(B, capacity, *k.shape[2:]),
        v.new_zeros(B, capacity, *v.shape[2:]),
        log_decay.new_zeros(B, capacity, *log_decay.shape[2:], dtype=torch.float32),
        torch.zeros(B, dtype=torch.int32, device=k.device),
    )


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
    """Outputs of n tentative tokens after ``state`` and the buffered ones; then say with ``keep`` which ones stay.

    q [B, n, H, K], k [B, n, Hk, K], v [B, n, Hv, V], log_decay [B, n, Hg, K] → out [B, n, H, V] of q's dtype

    The tokens' inputs are written behind the buffered ones, and the state is only read. Only a row whose buffer has
    no room for n more is folded into its state first (``fold``). Tokens not kept are overwritten by the next step.
    """
    _check_replay(q, k, v, log_decay, state, replay, min_log_decay)
    if runs_triton(q):
        from accel.kernels.linear_attention import triton

        return triton.replay_step(q, k, v, log_decay, state, replay, scale=scale, eps=eps, min_log_decay=min_log_decay)
    return reference.replay_step(q, k, v, log_decay, state, replay, scale=scale, eps=eps, min_log_decay=min_log_decay)


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
    """``replay_step`` with the two sides of its fraction apart, for hybrids that add a softmax window to both.

    → numerator [B, n, H, V] of q's dtype, denominator fp32 [B, n, H] (both scaled, no eps)
    """
    _check_replay(q, k, v, log_decay, state, replay, min_log_decay)
    if runs_triton(q):
        from accel.kernels.linear_attention import triton

        return triton.replay_terms(q, k, v, log_decay, state, replay, scale=scale, min_log_decay=min_log_decay)
    numerator, denominator = reference.replay_terms(
        q, k, v, log_decay, state, replay, scale=scale, min_log_decay=min_log_decay
    )
    return numerator.to(q.dtype), denominator


def _check_replay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State, replay: Replay, min_log_decay: float | None
) -> None:
    _check(q, k, v, log_decay, 4)
    _check_state(state, "state", (len(q), q.shape[2], q.shape[3], v.shape[3]), q.device)
    _check_floor(min_log_decay)
    if q.shape[1] > replay.capacity:
        raise ValueError(f"{q.shape[1]} tokens for a replay buffer of {replay.capacity}: make it larger or send fewer")
    for name, buffered, new in (("k", replay.k, k), ("v", replay.v, v), ("log_decay", replay.log_decay, log_decay)):
        if (len(buffered), *buffered.shape[2:]) != (len(new), *new.shape[2:]):
            raise ValueError(
                f"{name} is {list(new.shape)}, the replay buffer's {list(buffered.shape)}: "
                "they may differ in the second place only; make the buffer with new_replay"
            )


def keep(replay: Replay, counts: Tensor) -> None:
    """Of the last ``replay_step``'s n tokens, row b keeps the first counts[b] (0..n); counts: integers [B]."""
    if counts.shape != replay.length.shape or counts.is_floating_point():
        raise ValueError(f"counts is {counts.dtype} {list(counts.shape)}: it must be integers [B] = [{len(replay.k)}]")
    replay.length.add_(counts)


def fold(state: State, replay: Replay, *, room: int | None = None) -> None:
    """Move buffered tokens into ``state``, in place, in rows with fewer than ``room`` free places (None: in all)."""
    if room is not None and not 0 <= room <= replay.capacity:
        raise ValueError(
            f"room={room}: must be 0..{replay.capacity}, the replay buffer's capacity, or None for all rows"
        )
    if runs_triton(state.s):
        from accel.kernels.linear_attention import triton

        return triton.fold(state, replay, room=room)
    return reference.fold(state, replay, room=room)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, ndim: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, log_decay {list(log_decay.shape)}"
    inputs = (q, k, v, log_decay)
    layout = "[B, T, heads, width]" if ndim == 4 else "[B, heads, width]"
    if any(x.ndim != ndim or x.shape[: ndim - 2] != q.shape[: ndim - 2] for x in inputs):
        raise ValueError(f"{shapes}: all must be {layout} and agree before the heads")
    H, K = q.shape[-2:]
    if any(not x.shape[-2] or H % x.shape[-2] for x in inputs):
        raise ValueError(f"{shapes}: the heads of k, v and log_decay must divide q's {H}")
    if k.shape[-1] != K or log_decay.shape[-1] != K or not 1 <= K <= 256 or not 1 <= v.shape[-1] <= 256:
        raise ValueError(f"{shapes}: q, k and log_decay must have one width K, and K and V be in 1..256")
    types = (torch.float32, torch.bfloat16, torch.float16)
    if q.dtype not in types or {k.dtype, v.dtype} != {q.dtype} or not log_decay.is_floating_point():
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, log_decay {log_decay.dtype}: q, k and v must have one type of "
            "float32, bfloat16 and float16, log_decay any floating-point type"
        )


def _check_sequences(q: Tensor, v: Tensor, initial_state: State | None, cu_seqlens: Tensor | None) -> None:
    N = len(q)
    if cu_seqlens is not None:
        if N != 1 or cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)} for B = {N}: "
                "it must be int32 or int64 [N+1], with the sequences packed into B = 1"
            )
        N = len(cu_seqlens) - 1
    if initial_state is not None:
        _check_state(initial_state, "initial_state", (N, q.shape[2], q.shape[3], v.shape[3]), q.device)


def _check_state(state: State, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    s, z = state
    if s.shape != shape or z.shape != shape[:3] or s.dtype != torch.float32 or z.dtype != torch.float32:
        raise ValueError(
            f"{name} is s {s.dtype} {list(s.shape)}, z {z.dtype} {list(z.shape)}: "
            f"they must be fp32, [N, H, K, V] = {list(shape)} and [N, H, K]"
        )
    if s.device != device or not s.is_contiguous() or not z.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on {device}, where q is; s is on {s.device}")


def _check_floor(min_log_decay: float | None) -> None:
    if min_log_decay is not None and not min_log_decay <= 0:
        raise ValueError(f"min_log_decay={min_log_decay}: log decays are at most 0; give a bound below, or None")
