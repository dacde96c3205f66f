"""From projections to the features of linear attention: causal conv, softmax feature map, forget gate (README.md).

Knows one layer's queries, keys and gate logits. Does not know values, the attention itself or the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.kernels.conv_features import reference
from accel.kernels.conv_features.reference import FLOOR, ConvState, Features
from accel.kernels.device import runs_triton, wants_gradient

__all__ = ["ACTIVATIONS", "FLOOR", "ConvState", "Features", "conv_features", "conv_features_step"]

ACTIVATIONS = (None, "silu")
# what the kernels are compiled for
TAPS = 4
MAX_HEAD_DIM = 256
MAX_FEATURES = 128


def conv_features(
    q: Tensor,
    k: Tensor,
    gate: Tensor | None = None,
    *,
    q_map: Tensor,
    k_map: Tensor,
    q_taps: Tensor | None = None,
    k_taps: Tensor | None = None,
    activation: str | None = None,
    gate_normalizer: float = 16.0,
    min_log_decay: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ConvState | None = None,
) -> Features:
    """Features of a stretch of tokens: keys repeated to the query heads, convolved, mapped; the gate as log-decay.

    q [B, T, H, D], k [B, T, Hkv, D] (head h reads key head h // G, G = H / Hkv), gate logits [B, T, Hkv, K], one dtype;
    q_map, k_map [H, D, f], K = 2f; q_taps, k_taps [H, D, 4], the last tap is the current token's
    → q [B, T, H, 2f], k [B, T, H, 2f], log_decay [B, T, Hkv, K], all in q's dtype, and the conv's state

    Without taps there is no conv and the state is None; without gate log_decay is None. ``activation``: "silu" after
    the conv. log_decay = logsigmoid(gate) / ``gate_normalizer``, at least ``min_log_decay``. ``state``: what the conv
    remembers of the tokens before (None: nothing, zeros). The new state is new memory, so that the old one can be kept
    for a rollback; a sequence in pieces gives what the whole one gives.

    ``mask`` bool [B, T]: False where a token is left padding. The conv reads it as zeros, its key features and its
    log_decay are 0 (so it neither enters a recurrent state nor decays it); its query features mean nothing.
    ``cu_seqlens`` int32 or int64 [N+1]: the bounds of N sequences packed into B = 1, from 0 to T, some may be empty;
    the state then has a row a sequence. The bounds' values are not checked: on a GPU that would wait for the device.

    Taps in fp32 and maps in q's dtype are read as they are; others are converted at every call.
    """
    _check(q, k, gate, q_map, k_map, q_taps, k_taps, activation, gate_normalizer, "[B, T, H, D]")
    B, T = q.shape[:2]
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}: must be bool [B, T] = [{B}, {T}]")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: int32 or int64 [N+1], N ≥ 1")
        if B != 1:
            raise ValueError(f"B={B} with cu_seqlens: pack the sequences into one row, B = 1")
    _check_state(state, q, k, q_taps, B if cu_seqlens is None else len(cu_seqlens) - 1)
    options: dict[str, Any] = {
        "q_map": q_map, "k_map": k_map, "q_taps": q_taps, "k_taps": k_taps, "activation": activation,
        "gate_normalizer": gate_normalizer, "min_log_decay": min_log_decay, "mask": mask, "cu_seqlens": cu_seqlens,
        "state": state,
    }  # fmt: skip
    if runs_triton(q) and not wants_gradient(q, k, gate, q_map, k_map, q_taps, k_taps):
        from accel.kernels.conv_features import triton

        return triton.conv_features(q, k, gate, **options)
    return reference.conv_features(q, k, gate, **options)


def conv_features_step(
    q: Tensor,
    k: Tensor,
    gate: Tensor | None = None,
    *,
    q_map: Tensor,
    k_map: Tensor,
    q_taps: Tensor,
    k_taps: Tensor,
    state: ConvState,
    activation: str | None = None,
    gate_normalizer: float = 16.0,
    min_log_decay: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One more token a row: ``conv_features`` of T = 1, but ``state`` is brought up to date in place.

    q [B, H, D], k [B, Hkv, D], gate logits [B, Hkv, K] → q [B, H, 2f], k [B, H, 2f], log_decay [B, Hkv, K] or None

    The memory stays where it is, so that the step can be captured in a CUDA graph; who may have to take the token back
    copies the state first. A map without a conv has no state: give its B tokens to ``conv_features`` as T = B.
    """
    _check(q, k, gate, q_map, k_map, q_taps, k_taps, activation, gate_normalizer, "[B, H, D]")
    if q_taps is None or state is None:
        raise ValueError("a step needs taps and a state: without a conv use conv_features with the B tokens as T = B")
    _check_state(state, q, k, q_taps, len(q))
    if not (state.q.is_contiguous() and state.k.is_contiguous()):
        raise ValueError("state is updated in place and must be contiguous: give state.q and state.k their own memory")
    options: dict[str, Any] = {
        "q_map": q_map, "k_map": k_map, "q_taps": q_taps, "k_taps": k_taps, "activation": activation,
        "gate_normalizer": gate_normalizer, "min_log_decay": min_log_decay, "state": state,
    }  # fmt: skip
    if runs_triton(q):
        from accel.kernels.conv_features import triton

        return triton.conv_features_step(q, k, gate, **options)
    return reference.conv_features_step(q, k, gate, **options)


def _check(
    q: Tensor, k: Tensor, gate: Tensor | None, q_map: Tensor, k_map: Tensor, q_taps: Tensor | None,
    k_taps: Tensor | None, activation: str | None, gate_normalizer: float, layout: str,
) -> None:  # fmt: skip
    ndim = layout.count(",") + 1
    if q.ndim != ndim or k.ndim != ndim or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}: both must be {layout}, alike but for H")
    if not q.is_floating_point() or k.dtype != q.dtype or (gate is not None and gate.dtype != q.dtype):
        dtypes = ", ".join(str(x.dtype) for x in (q, k, gate) if x is not None)
        raise ValueError(f"q, k and gate are {dtypes}: cast them to one floating point dtype")
    (H, D), Hkv = q.shape[-2:], k.shape[-2]
    if not Hkv or H % Hkv or not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"H={H}, Hkv={Hkv}, D={D}: H must be a multiple of Hkv, and D in 1..{MAX_HEAD_DIM}")
    if q_map.shape != k_map.shape or q_map.ndim != 3 or q_map.shape[:2] != (H, D):
        raise ValueError(
            f"q_map is {list(q_map.shape)}, k_map {list(k_map.shape)}: must be [H, D, f] = [{H}, {D}, f] both"
        )
    f = q_map.shape[-1]
    if not 1 <= f <= MAX_FEATURES:
        raise ValueError(f"the maps have f={f}: must be in 1..{MAX_FEATURES}")
    if gate is not None and gate.shape != (*k.shape[:-1], 2 * f):
        raise ValueError(
            f"gate is {list(gate.shape)} for k {list(k.shape)} and f={f}: it has a channel a feature, so it must be "
            f"{[*k.shape[:-1], 2 * f]} (K = 2f)"
        )
    if (q_taps is None) != (k_taps is None):
        raise ValueError("q_taps and k_taps: give both or neither")
    if q_taps is None or k_taps is None:
        if activation is not None:
            raise ValueError(f"activation={activation!r} comes after the conv: give taps, or activation=None")
    elif not q_taps.shape == k_taps.shape == (H, D, TAPS):
        raise ValueError(
            f"q_taps is {list(q_taps.shape)}, k_taps {list(k_taps.shape)}: must be [H, D, W] = [{H}, {D}, {TAPS}] "
            "both; a narrower conv has zeros in front"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}")
    if not gate_normalizer > 0:
        raise ValueError(f"gate_normalizer={gate_normalizer}: must be positive (LAWCAT's is 16)")


def _check_state(state: ConvState | None, q: Tensor, k: Tensor, taps: Tensor | None, rows: int) -> None:
    if state is None:
        return
    if taps is None:
        raise ValueError("a state is the conv's memory: give taps, or state=None")
    for name, have, x in (("q", state.q, q), ("k", state.k, k)):
        expected = (rows, taps.shape[-1] - 1, *x.shape[-2:])
        if have.shape != expected or have.dtype != q.dtype or have.device != q.device:
            raise ValueError(
                f"state.{name} is {have.dtype} {list(have.shape)} on {have.device}: must be {q.dtype} "
                f"{list(expected)} on {q.device}; ConvState.zeros makes one"
            )
