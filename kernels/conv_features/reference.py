"""Features for linear attention, token by token as the equations have them: also the CPU path."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

# the least feature: keeps the attention's denominator positive
FLOOR = 1e-12


class ConvState(NamedTuple):
    """The last W−1 inputs of the conv, oldest first: q [N, W−1, H, D], k [N, W−1, Hkv, D], zeros before the start."""

    q: Tensor
    k: Tensor

    @classmethod
    def zeros(cls, rows: int, q: Tensor, k: Tensor, W: int = 4) -> ConvState:
        """The state before the first token of ``rows`` sequences; q [..., H, D] and k [..., Hkv, D] give its kind."""
        return cls(*(x.new_zeros(rows, W - 1, *x.shape[-2:]) for x in (q, k)))


class Features(NamedTuple):
    """q, k [B, T, H, 2f], log_decay [B, T, Hkv, 2f] (None without a gate), state (None without a conv)."""

    q: Tensor
    k: Tensor
    log_decay: Tensor | None
    state: ConvState | None


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
    """q [B, T, H, D], k [B, T, Hkv, D], gate [B, T, Hkv, 2f] → Features; see ``accel.kernels.conv_features``."""
    if mask is not None:
        q, k = (x.masked_fill(~mask[..., None, None], 0) for x in (q, k))
    new_state = None
    z_q, z_k = q, k
    if q_taps is not None and k_taps is not None:
        W = q_taps.shape[-1]
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        before = state or ConvState.zeros(len(q) if cu_seqlens is None else len(bounds) - 1, q, k, W)
        z_q, new_q = _conv(q, before.q, q_taps, bounds, activation, packed=cu_seqlens is not None)
        z_k, new_k = _conv(k, before.k, k_taps, bounds, activation, packed=cu_seqlens is not None)
        new_state = ConvState(new_q, new_k)
    feature_q, feature_k = _phi(z_q, q_map).to(q.dtype), _phi(z_k, k_map).to(q.dtype)
    log_decay = _log_decay(gate, gate_normalizer, min_log_decay)
    if mask is not None:
        feature_k = feature_k.masked_fill(~mask[..., None, None], 0)
        log_decay = None if log_decay is None else log_decay.masked_fill(~mask[..., None, None], 0)
    return Features(feature_q, feature_k, log_decay, new_state)


def conv_features_step(
    q: Tensor,
    k: Tensor,
    gate: Tensor | None = None,
    *,
    state: ConvState,
    **options: Tensor | float | str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [B, H, D], k [B, Hkv, D], gate [B, Hkv, 2f] → features of one token; ``state`` changes in place."""
    got = conv_features(q[:, None], k[:, None], None if gate is None else gate[:, None], state=state, **options)  # type: ignore[arg-type]
    assert got.state is not None
    state.q.copy_(got.state.q)
    state.k.copy_(got.state.k)
    return got.q[:, 0], got.k[:, 0], None if got.log_decay is None else got.log_decay[:, 0]


def _conv(
    x: Tensor, before: Tensor, taps: Tensor, bounds: list[int], activation: str | None, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """x [B, T, H or Hkv, D], taps [H, D, W] → z [B, T, H, D] in fp32 at least, the last W−1 inputs of every sequence.

    z_t = Σ_j taps_j x_{t−W+1+j}, with what the state remembers before the first token.
    """
    W, G = taps.shape[-1], len(taps) // x.shape[2]
    taps = taps.to(_accurate(x))
    pieces, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        rows = slice(n, n + 1) if packed else slice(None)
        history = torch.cat([before[rows], x[:, start:end]], 1)
        states.append(history[:, history.shape[1] - (W - 1) :])
        history = history.to(taps.dtype).repeat_interleave(G, dim=2)
        length = end - start
        z = taps[..., 0] * history[:, :length]
        for j in range(1, W):
            z = z + taps[..., j] * history[:, j : j + length]
        pieces.append(silu(z) if activation == "silu" else z)
    return torch.cat(pieces, 1), torch.cat(states, 0).clone()


def _phi(z: Tensor, weights: Tensor) -> Tensor:
    """z [B, T, H or Hkv, D], weights [H, D, f] → max(softmax(z W) ‖ softmax(−z W), FLOOR) [B, T, H, 2f]."""
    z = z.to(_accurate(z)).repeat_interleave(len(weights) // z.shape[2], dim=2)
    scores = torch.einsum("bthd,hdf->bthf", z, weights.to(z.dtype))
    return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).clamp(min=FLOOR)


def _log_decay(gate: Tensor | None, normalizer: float, least: float | None) -> Tensor | None:
    """gate [..., K] logits → max(logsigmoid(gate) / normalizer, least) [..., K]."""
    if gate is None:
        return None
    log_decay = logsigmoid(gate.to(_accurate(gate))) / normalizer
    return (log_decay if least is None else log_decay.clamp(min=least)).to(gate.dtype)


def _accurate(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what sums are made in."""
    return torch.promote_types(x.dtype, torch.float32)
