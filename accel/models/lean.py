"""The forward pass of a small llama-like draft model on a CPU, in as few torch calls as its equations need.

A draft of a few million parameters multiplies for a fraction of a millisecond and spends several times that in the
Python of a general model class. This is the same decoder (RMSNorm, rotary embeddings, grouped heads, gated SiLU) with
the projections that read one input joined to one matrix, over rows that advance and roll back on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from accel.models.softmax_target import SoftmaxTarget

# Proved equal to transformers' own by tests/models/test_lean.py
CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# rotations whose angles do not depend on how long the text is
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
# with more than these, products outweigh calls, and joined weights are a copy worth saving
MAX_PARAMETERS = 100_000_000
# tails and the table of rotations grow by doubling from here
_MIN_CAPACITY = 256


def draft_reader(model: PreTrainedModel) -> LeanDecoder | SoftmaxTarget:
    """What a drafter reads ``model`` with: the lean pass where it is known to say the same."""
    return LeanDecoder(model) if supports(model) else SoftmaxTarget(model)


def supports(model: PreTrainedModel) -> bool:
    """Whether the lean pass computes what this model computes: its own class on a CPU, with nobody's changes in it."""
    if type(model) not in CLASSES or model.device.type != "cpu":
        return False
    config = model.config
    return (
        model.dtype.is_floating_point
        and model.num_parameters() <= MAX_PARAMETERS
        and config.hidden_act == "silu"
        and config.rope_parameters.get("rope_type", "default") in ROTATIONS
        and not (type(model) is MistralForCausalLM and config.sliding_window is not None)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and all(_is_untouched(module) for module in model.modules())
        # torch does not tell when these are written to
        and not any(parameter.is_inference() for parameter in model.parameters())
    )


def _is_untouched(module: nn.Module) -> bool:
    """No hook on it, no forward put in its place, no stranger in a linear layer's place (LoRA, quantised)."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return not changed and (not isinstance(module, nn.Linear) or type(module) is nn.Linear)


@dataclass
class _Row:
    """One row's context: ``length`` committed positions and ``num_tentative`` behind them, per layer [Hkv, cap, D]."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    num_tentative: int = 0


class _Joined:
    """Linear layers that read one input, as one fp32 ``linear``; it follows when a weight of theirs is changed."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = parts
        inputs, outputs = parts[0].in_features, sum(part.out_features for part in parts)
        # nobody's random numbers are touched
        has_bias = parts[0].bias is not None
        self.linear = nn.Linear(inputs, outputs, has_bias, device="meta", dtype=torch.float32).requires_grad_(False)
        self._made_of: tuple[object, ...] = ()
        self._is_own = False
        self.refresh()

    def refresh(self) -> None:
        weights = (w for part in self.parts for w in part._parameters.values() if w is not None)
        now = tuple((w.data_ptr(), w._version) for w in weights)
        if now == self._made_of:
            return
        self._made_of = now
        first = self.parts[0]
        if len(self.parts) == 1 and first.weight.dtype == torch.float32:
            self.linear.weight, self.linear.bias, self._is_own = first.weight, first.bias, False
            return
        if not self._is_own:
            self.linear.weight, self.linear.bias = (
                None if old is None else nn.Parameter(torch.empty(old.shape, dtype=torch.float32), requires_grad=False)
                for old in (self.linear.weight, self.linear.bias)
            )
            self._is_own = True
        # written in place, so that whoever packed the old values can see that they changed
        self.linear.weight.copy_(torch.cat([part.weight for part in self.parts]))
        if self.linear.bias is not None:
            self.linear.bias.copy_(torch.cat([part.bias for part in self.parts]))


class _Layer:
    """One decoder layer's weights; its four matrices are in ``linears`` of the decoder."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _Joined([attention.o_proj])
        self.gate_up = _Joined([mlp.gate_proj, mlp.up_proj])
        self.down = _Joined([mlp.down_proj])
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        # qwen3 also normalises each query and key
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)

    def joined(self) -> list[_Joined]:
        return [self.qkv, self.out, self.gate_up, self.down]


class LeanDecoder:
    """Rows of a draft model, as a drafter uses them: the part of ``accel.axes.Target`` without forks and segments.

    Computes in fp32 whatever the model's precision; ``linears`` are the layers for ``cpu_linear.install``.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.model = model
        self.device = model.device
        self.vocab_size: int = config.vocab_size
        self.max_positions: int | None = config.max_position_embeddings
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size: int = model.model.layers[0].self_attn.head_dim
        self._scale = self._head_size**-0.5
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._head = _Joined([model.lm_head])
        self._joined = [*(joined for layer in self._layers for joined in layer.joined()), self._head]
        self.linears = nn.ModuleList([joined.linear for joined in self._joined])
        self._rotation = torch.empty(2, 0, 1, self._head_size, dtype=torch.float32)
        self._rows: dict[int, _Row] = {}
        self._next_row = 0

    def open(self) -> int:
        """A new, empty row; returns its name."""
        name, self._next_row = self._next_row, self._next_row + 1
        empty = torch.empty(self._kv_heads, 0, self._head_size, dtype=torch.float32)
        self._rows[name] = _Row([empty] * len(self._layers), [empty] * len(self._layers))
        return name

    def close(self, rows: Iterable[int]) -> None:
        for name in rows:
            del self._rows[name]

    def num_positions(self, row: int) -> int:
        """Position of the row's next token, behind everything committed."""
        return self._rows[row].length

    def state_bytes(self) -> int:
        per_position = 2 * 4 * len(self._layers) * self._kv_heads * self._head_size
        return per_position * sum(row.length + row.num_tentative for row in self._rows.values())

    def commit(self, keep: Sequence[int], rows: Sequence[int]) -> None:
        """Keep the first ``keep[r]`` tentative tokens of each row, drop the others."""
        for count, name in zip(keep, rows, strict=True):
            row = self._rows[name]
            assert 0 <= count <= row.num_tentative, "a row can keep no more than it was given"
            row.length += count
            row.num_tentative = 0

    @torch.no_grad()
    def forward(self, tokens: Tensor, rows: Sequence[int], keep: Sequence[int] | None = None) -> Tensor:
        """Add n tentative tokens to rows: ``[R, n]`` → fp32 logits ``[R, n, V]``, or ``[R, len(keep), V]``."""
        for joined in self._joined:
            joined.refresh()
        n = tokens.shape[1]
        states = [self._rows[name] for name in rows]
        starts = [row.length + row.num_tentative for row in states]
        for row, start in zip(states, starts, strict=True):
            _grow(row, start + n)
            row.num_tentative += n
        cos, sin = self._rotations(starts, n)
        mask = _masks(starts, n)
        x = F.embedding(tokens.reshape(-1), self.model.model.embed_tokens.weight).float()  # [R·n, H]
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv.linear(_normed(layer.before_attention, x))
            qkv = qkv.view(len(x), self._heads + 2 * self._kv_heads, self._head_size)
            q, k = self._rotated(layer, qkv, cos, sin)
            v = qkv[:, self._heads + self._kv_heads :]
            parts = []
            for place, (row, start) in enumerate(zip(states, starts, strict=True)):
                mine = slice(place * n, (place + 1) * n)
                keys, values = row.keys[index], row.values[index]
                keys[:, start : start + n] = k[mine].transpose(0, 1)
                values[:, start : start + n] = v[mine].transpose(0, 1)
                parts.append(self._attend(q[mine], keys[:, : start + n], values[:, : start + n], mask[place]))
            x = x + layer.out.linear(parts[0] if len(parts) == 1 else torch.cat(parts))
            gate, up = layer.gate_up.linear(_normed(layer.before_mlp, x)).chunk(2, -1)
            x = x + layer.down.linear(F.silu(gate).mul_(up))
        if keep is not None and len(keep) < n:
            x = x.view(len(rows), n, -1)[:, list(keep)].reshape(len(rows) * len(keep), -1)
        logits: Tensor = self._head.linear(_normed(self.model.model.norm, x))
        return logits.view(len(rows), -1, self.vocab_size)

    def _rotated(self, layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[N, Hq, D]`` and keys ``[N, Hkv, D]``, turned to their positions."""
        if layer.query_norm is not None and layer.key_norm is not None:
            q = _normed(layer.query_norm, qkv[:, : self._heads])
            k = _normed(layer.key_norm, qkv[:, self._heads : self._heads + self._kv_heads])
            both = torch.cat([q, k], 1)
        else:
            both = qkv[:, : self._heads + self._kv_heads]
        # rotate_half is a roll by half, its sign is in the table
        turned = torch.addcmul(both * cos, both.roll(self._head_size // 2, -1), sin)
        return turned[:, : self._heads], turned[:, self._heads :]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Query ``[n, Hq, D]`` over keys and values ``[Hkv, L, D]`` of one row → ``[n, Hq · D]``."""
        n = len(q)
        if n == 1:
            # heads that share keys are rows of one product; SDPA takes longer over its arguments than over this
            weights = (q.view(self._kv_heads, -1, self._head_size) * self._scale) @ keys.transpose(1, 2)
            return (weights.softmax(-1) @ values).view(1, -1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(n, -1)

    def _rotations(self, starts: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin ``[R·n, 1, D]`` of the new positions."""
        end = max(starts) + n
        if end > self._rotation.shape[1]:
            positions = torch.arange(_capacity(end))
            cos, sin = self.model.model.rotary_emb(self._rotation, positions[None])
            half = self._head_size // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self._rotation = torch.stack([cos[0], signed[0]])[:, :, None]
        pieces = [self._rotation[:, start : start + n] for start in starts]
        cos, sin = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).unbind()
        return cos, sin


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)


def _masks(starts: Sequence[int], n: int) -> list[Tensor | None]:
    """Per row, which keys its new queries see ``[n, L]``; None for one query, and where "causal" says it all."""
    if n == 1:
        return [None] * len(starts)
    return [torch.ones(n, start + n, dtype=torch.bool).tril_(start) if start else None for start in starts]


def _grow(row: _Row, length: int) -> None:
    """Room for ``length`` positions."""
    if length <= row.keys[0].shape[1]:
        return
    for store in (row.keys, row.values):
        for layer, old in enumerate(store):
            new = old.new_empty(old.shape[0], _capacity(length), old.shape[2])
            new[:, : old.shape[1]] = old
            store[layer] = new


def _capacity(length: int) -> int:
    capacity = _MIN_CAPACITY
    while capacity < length:
        capacity *= 2
    return capacity
