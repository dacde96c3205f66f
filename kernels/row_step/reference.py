"""What a decoder layer does for a few tokens, in plain PyTorch: the equations, and the path without C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# outputs whose weights lie together, as cpu.c has it
PANEL = 16
# 8-bit weights of inputs that lie together
PACKED = 4


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight ``[O, I]`` as ``[⌈O/16⌉, I, 16]``, so that products read it from front to back; zeros fill the last.

    ``scales``: None, or fp32 ``[⌈O/16⌉ · 16]``, what an output is multiplied by. Then weights are int8
    ``[⌈O/16⌉, ⌈I/4⌉, 16, 4]``.
    """

    weights: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    # cpu.c's Weight and where it lies: asked for in every product, and a tensor takes its time to answer
    record: Tensor
    address: int


def panels(weight: Tensor, *, in_8_bits: bool = False) -> Panels:
    """An fp32 weight ``[O, I]``, reordered; ``in_8_bits``: and rounded, each output to its own largest weight."""
    outputs, inputs = weight.shape
    weights, scales = F.pad(weight.detach(), (0, 0, 0, -outputs % PANEL)), None
    if in_8_bits:
        scales = weights.abs().amax(-1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        weights = F.pad((weights / scales[:, None]).round_().to(torch.int8), (0, -inputs % PACKED))
        weights = weights.unflatten(-1, (-1, PACKED))
    weights = weights.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    padded = inputs if scales is None else weights.shape[1] * PACKED
    record = torch.tensor([weights.data_ptr(), 0 if scales is None else scales.data_ptr(), padded, len(weights)])
    return Panels(weights, scales, outputs, inputs, record, record.data_ptr())


def linear(x: Tensor, panels: Panels) -> Tensor:
    """x weightᵀ: x ``[…, I]``, a weight ``[O, I]`` → ``[…, O]``."""
    weights = panels.weights
    if panels.scales is not None:
        weights = weights.transpose(2, 3).flatten(1, 2)[:, : panels.inputs] * panels.scales.view(-1, 1, PANEL)
    return torch.einsum("...i,pio->...po", x, weights).flatten(-2)[..., : panels.outputs]


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer: its norms' weights ``[H]``, and its products, each of one weight or of parts side by side."""

    before_attention: Tensor
    before_mlp: Tensor
    qkv: Sequence[Panels]
    out: Sequence[Panels]
    gate_up: Sequence[Panels]
    down: Sequence[Panels]


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
    depths: Tensor | None = None,
) -> Tensor:
    """As ``accel.kernels.row_step.attend``, a row at a time."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    out = torch.empty_like(q)
    for slot, start, position, first, count in rows.tolist():
        new, old = slice(first, first + count), slice(start, start + count)
        behind = torch.arange(count) if depths is None else depths[new]
        angles = [table[position + behind, None] for table in (cosine, sine)]
        keys[slot, :, old] = rotate(k[new].unflatten(-1, (kv_heads, size)), *angles).transpose(0, 1)
        values[slot, :, old] = v[new].unflatten(-1, (kv_heads, size)).transpose(0, 1)
        queries = rotate(q[new].unflatten(-1, (-1, size)), *angles).transpose(0, 1)
        own = torch.eye(count, dtype=torch.bool)
        seen = torch.cat([torch.ones(count, start, dtype=torch.bool), (torch.arange(count) < behind[:, None]) | own], 1)
        k_row, v_row = keys[slot, :, : start + count], values[slot, :, : start + count]
        found = F.scaled_dot_product_attention(
            queries[None], k_row[None], v_row[None], attn_mask=seen, scale=scale, enable_gqa=True
        )
        out[new] = found[0].transpose(0, 1).flatten(1)
    return out


def layers(
    x: Tensor,
    stack: Sequence[Layer],
    rows: Tensor,
    cosine: Tensor,
    sine: Tensor,
    stores: Sequence[tuple[Tensor, Tensor]],
    *,
    heads: int,
    eps: float,
    scale: float,
    depths: Tensor | None = None,
) -> Tensor:
    """As ``accel.kernels.row_step.layers``."""
    delta = None
    for layer, (keys, values) in zip(stack, stores, strict=True):
        size = keys.shape[3]
        qkv = _side_by_side(add_norm(x, delta, layer.before_attention, eps), layer.qkv)
        q, k, v = qkv.split([size * n for n in (heads, keys.shape[1], keys.shape[1])], -1)
        attended = attend(q, k, v, rows, cosine, sine, keys, values, scale=scale, depths=depths)
        delta = _side_by_side(attended, layer.out)
        gate, up = _side_by_side(add_norm(x, delta, layer.before_mlp, eps), layer.gate_up).chunk(2, -1)
        delta = _side_by_side(silu_mul(gate, up), layer.down)
    return x if delta is None else x.add_(delta)


def _side_by_side(x: Tensor, parts: Sequence[Panels]) -> Tensor:
    return torch.cat([linear(x, part) for part in parts], -1)
