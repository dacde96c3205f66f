"""What a linear layer computes from its projections, and what it has to remember of the tokens before.

Plain functions over dense batches and packed sequences. Who keeps the memory, and may take tokens back, is state.py's
and transformers_cache.py's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from accel.kernels.conv_features import ConvState, Features, conv_features
from accel.kernels.linear_attention import State, linear_attention, linear_attention_terms
from accel.models.linear.window import WindowState, window_terms

if TYPE_CHECKING:
    from accel.models.linear.layer import LinearAttention


class Projected(NamedTuple):
    """A layer's inputs to attention: q [B, T, H, D], k and v [B, T, Hkv, D], gate logits [B, T, Hkv, K] or None.

    ``rotated_q`` and ``rotated_k``: the same turned to their positions, where a window or the map reads them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    rotated_q: Tensor | None
    rotated_k: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Projected:
        """``change`` on every tensor there is."""
        return Projected(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


class Memory(NamedTuple):
    """What B sequences leave behind in one layer; None where the layer has no such part."""

    linear: State
    conv: ConvState | None
    window: WindowState | None


def features(layer: LinearAttention, x: Projected, conv: ConvState | None, **sequences: Tensor | None) -> Features:
    """q, k [B, T, H, K] and log_decay [B, T, Hkv or 1, K] of a stretch; ``sequences``: ``mask`` or ``cu_seqlens``."""
    spec = layer.spec
    q, k = (x.rotated_q, x.rotated_k) if spec.rope else (x.q, x.k)
    assert q is not None and k is not None
    found = conv_features(
        q,
        k,
        x.gate,
        q_map=layer.q_map,
        k_map=layer.q_map if layer.k_map is None else layer.k_map,
        q_taps=layer.q_taps,
        k_taps=layer.q_taps if layer.k_taps is None else layer.k_taps,
        activation=spec.activation,
        gate_normalizer=spec.gate_normalizer,
        min_log_decay=spec.min_log_decay,
        state=conv,
        mask=sequences.get("mask"),
        cu_seqlens=sequences.get("cu_seqlens"),
    )
    if found.log_decay is not None:
        return found
    # nothing is forgotten
    return found._replace(log_decay=torch.zeros_like(found.k[:, :, :1]))


def attend(
    layer: LinearAttention,
    x: Projected,
    before: Memory | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Outputs [B, T, H, D] of a stretch of tokens behind ``before`` (None: nothing), and the memory after it.

    ``mask`` bool [B, T]: False at padding, which is neither remembered nor decays what is. ``cu_seqlens``: bounds of
    N sequences packed into B = 1; the memories then have N rows.
    """
    linear, conv, window = before if before is not None else (None, None, None)
    f = features(layer, x, conv, mask=mask, cu_seqlens=cu_seqlens)
    assert f.log_decay is not None
    inputs = (f.q, f.k, x.v, f.log_decay)
    if layer.spec.is_fraction:
        out, after = linear_attention(
            *inputs, eps=layer.spec.eps, initial_state=linear, cu_seqlens=cu_seqlens,
            min_log_decay=layer.spec.min_log_decay,
        )  # fmt: skip
        return out, Memory(after, f.state, None)
    numerator, denominator, after = linear_attention_terms(
        *inputs, initial_state=linear, cu_seqlens=cu_seqlens, min_log_decay=layer.spec.min_log_decay
    )
    beside = None
    if layer.spec.window:
        beside, window = window_terms(layer, x, window, mask=mask, cu_seqlens=cu_seqlens)
    return combine(layer, numerator, denominator, beside), Memory(after, f.state, window)


def combine(
    layer: LinearAttention, numerator: Tensor, denominator: Tensor, beside: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Linear terms [B, T, H, D] and [B, T, H] and the window's, if any → outputs [B, T, H, D]; sums in fp32.

    o = (w Σ e v + l · numerator) / (w Σ e + l · denominator + eps), w = sigmoid(window_factors), l = 1 or 1 - w.
    """
    spec, kind = layer.spec, numerator.dtype
    if not spec.normalised:
        return numerator
    numerator, denominator = numerator.float(), denominator[..., None]
    if layer.window_factors is not None:
        weight = layer.window_factors.float().sigmoid()[:, None]  # [H, 1]
        if spec.affine:
            numerator, denominator = (1 - weight) * numerator, (1 - weight) * denominator
        if beside is not None:
            numerator = numerator + weight * beside[0]
            denominator = denominator + weight * beside[1][..., None]
    return (numerator / (denominator + spec.eps)).to(kind)
