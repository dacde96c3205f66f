"""What a decoder layer does for a few tokens, in plain PyTorch: the equations, and the path without C."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# outputs whose weights lie together, as cpu.c has it
PANEL = 16


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight ``[O, I]`` as ``[⌈O/16⌉, I, 16]``, so that products read it from front to back; zeros fill the last."""

    weights: Tensor
    outputs: int
    # asked for in every product, and a tensor takes its time to answer
    address: int
    num_panels: int
    inputs: int


def panels(weight: Tensor) -> Panels:
    """An fp32 weight ``[O, I]``, reordered."""
    padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % PANEL))
    weights = padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return Panels(weights, len(weight), weights.data_ptr(), *weights.shape[:2])


def linear(x: Tensor, panels: Panels) -> Tensor:
    """x weightᵀ: x ``[…, I]``, a weight ``[O, I]`` → ``[…, O]``."""
    return torch.einsum("...i,pio->...po", x, panels.weights).flatten(-2)[..., : panels.outputs]


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, then RMSNorm(x): x, delta ``[N, H]``, weight ``[H]`` → ``[N, H]``."""
    if delta is not None:
        x.add_(delta)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up: ``[N, I]`` each → ``[N, I]``."""
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads: x ``[N, H, D]``, tables ``[N, 1, D]`` → ``[N, H, D]``.

    ``sine`` is negative in its first half: then rotate_half is a roll by half.
    """
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
) -> Tensor:
    """As ``accel.kernels.row_step.attend``, a row at a time."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    out = torch.empty_like(q)
    for slot, start, position, first, count in rows.tolist():
        new, old = slice(first, first + count), slice(start, start + count)
        angles = [table[position : position + count, None] for table in (cosine, sine)]
        keys[slot, :, old] = rotate(k[new].unflatten(-1, (kv_heads, size)), *angles).transpose(0, 1)
        values[slot, :, old] = v[new].unflatten(-1, (kv_heads, size)).transpose(0, 1)
        queries = rotate(q[new].unflatten(-1, (-1, size)), *angles).transpose(0, 1)
        seen = torch.ones(count, start + count, dtype=torch.bool).tril_(start)
        k_row, v_row = keys[slot, :, : start + count], values[slot, :, : start + count]
        found = F.scaled_dot_product_attention(
            queries[None], k_row[None], v_row[None], attn_mask=seen, scale=scale, enable_gqa=True
        )
        out[new] = found[0].transpose(0, 1).flatten(1)
    return out
