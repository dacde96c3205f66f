"""What a linear layer computes from its projections, and what it has to remember of the tokens before.

Plain functions over dense batches and packed sequences. Who keeps the memory, and may take tokens back, is state.py's
and transformers_cache.py's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from accel.kernels.conv_features import ConvState, conv_features
from accel.kernels.linear_attention import State, linear_attention, linear_attention_terms
from accel.models.linear.window import WindowState, delayed, window_terms

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


class Inputs(NamedTuple):
    """What linear attention takes of a stretch: q, k [B, T, H, K], v [B, T, Hkv, D], log_decay [B, T, Hkv or 1, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor


def linear_inputs(
    layer: LinearAttention,
    x: Projected,
    before: Memory | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Inputs, ConvState | None]:
    """Features of a stretch behind ``before``, and the conv's memory after it; see ``attend``."""
    spec, v = layer.spec, x.v
    q, k = (x.rotated_q, x.rotated_k) if spec.rope else (x.q, x.k)
    if not spec.covers_window:
        # Without conv and gate only the token that enters counts. Where there is none yet the state is empty, so that
        # it does not matter that the mask is the query's too.
        k, v, mask = delayed(layer, x, None if before is None else before.window, mask=mask, cu_seqlens=cu_seqlens)
        cu_seqlens = None
    assert q is not None and k is not None
    f = conv_features(
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
        state=None if before is None else before.conv,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    # without a gate nothing is forgotten
    log_decay = torch.zeros_like(f.k[:, :, :1]) if f.log_decay is None else f.log_decay
    return Inputs(f.q, f.k, v, log_decay), f.state


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
    spec = layer.spec
    inputs, conv = linear_inputs(layer, x, before, mask, cu_seqlens)
    options: dict[str, Any] = {
        "scale": spec.scale,
        "initial_state": None if before is None else before.linear,
        "cu_seqlens": cu_seqlens,
        "min_log_decay": spec.min_log_decay,
    }
    if spec.is_fraction:
        out, after = linear_attention(*inputs, eps=spec.eps, **options)
        return out, Memory(after, conv, None)
    numerator, denominator, after = linear_attention_terms(*inputs, **options)
    beside, window = None, None
    if spec.window:
        window = None if before is None else before.window
        beside, window = window_terms(layer, x, window, mask=mask, cu_seqlens=cu_seqlens)
    return combine(layer, numerator, denominator, beside), Memory(after, conv, window)


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
    # a padded position may see nothing at all, and 0 / 0 would spread from there
    return (numerator / (denominator + spec.eps).clamp(min=torch.finfo(torch.float32).tiny)).to(kind)
