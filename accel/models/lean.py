"""The forward pass of a small llama-like draft model on a CPU, in as few torch calls as its equations need.

A draft of a few million parameters multiplies for a fraction of a millisecond and spends several times that in the
Python of a general model class. This is the same decoder (RMSNorm, rotary embeddings, grouped heads, gated SiLU) with
the projections that read one input joined to one matrix, over the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from accel.models.attention import row_attention
from accel.models.linear import is_linear, target_for
from accel.models.row_cache import MIN_TAIL_CAPACITY, LayerView
from accel.models.softmax_target import SoftmaxTarget

# Proved equal to transformers' own by tests/models/test_lean.py
CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# rotations whose angles do not depend on how long the text is
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
# with more than these, products outweigh calls, and joined weights are a copy worth saving
MAX_PARAMETERS = 100_000_000


def draft_reader(model: PreTrainedModel) -> SoftmaxTarget:
    """What a drafter reads ``model`` with: the lean pass where it is known to say the same."""
    return LeanDecoder(model) if supports(model) else target_for(model)


def supports(model: PreTrainedModel) -> bool:
    """Whether the lean pass computes what this model computes: its own class on a CPU, with nobody's changes in it."""
    if type(model) not in CLASSES or model.device.type != "cpu" or is_linear(model):
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


class LeanDecoder(SoftmaxTarget):
    """A ``SoftmaxTarget`` whose forward pass is its own, in fp32 whatever the model's precision."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = model.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size: int = model.model.layers[0].self_attn.head_dim
        self._scale = self._head_size**-0.5
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._head = _Joined([model.lm_head])
        self._joined = [*(joined for layer in self._layers for joined in layer.joined()), self._head]
        self.linears = nn.ModuleList([joined.linear for joined in self._joined])
        self._rotation = torch.empty(2, 0, 1, self._head_size, dtype=torch.float32)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        """Add n tentative tokens to rows: ``[R, n]`` → fp32 logits ``[R, n, V]``, or ``[R, len(keep), V]``."""
        for joined in self._joined:
            joined.refresh()
        n = tokens.shape[1]
        step = self.cache.begin(rows, n)
        cos, sin = self._rotations(step.first_positions, n)
        x = F.embedding(tokens.reshape(-1), self.model.model.embed_tokens.weight).float()  # [R·n, H]
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv.linear(_normed(layer.before_attention, x))
            qkv = qkv.view(len(x), self._heads + 2 * self._kv_heads, self._head_size)
            q, k = self._rotated(layer, qkv, cos, sin)
            new = (each.unflatten(0, (-1, n)).transpose(1, 2) for each in (k, qkv[:, -self._kv_heads :]))
            view, _ = self.cache.update(*new, index)
            x = x + layer.out.linear(self._attend(q, view))
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

    def _attend(self, q: Tensor, view: LayerView) -> Tensor:
        """Queries ``[R·n, Hq, D]`` over what their rows hold → ``[R·n, Hq · D]``."""
        step = view.step
        if len(q) == 1 and not step.rows[0].segments:
            # heads that share keys are rows of one product; SDPA takes longer over its arguments than over this
            weights = (q.view(self._kv_heads, -1, self._head_size) * self._scale) @ view.keys[0].transpose(1, 2)
            return (weights.softmax(-1) @ view.values[0]).view(1, -1)
        queries = q.unflatten(0, (-1, step.n)).transpose(1, 2)
        out, _ = row_attention(self.model, queries, view, view, None, scaling=self._scale)
        return out.reshape(len(q), -1)

    def _rotations(self, starts: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin ``[R·n, 1, D]`` of the new positions."""
        end = max(starts) + n
        if end > self._rotation.shape[1]:
            positions = torch.arange(max(MIN_TAIL_CAPACITY, 2 * end))
            cos, sin = self.model.model.rotary_emb(self._rotation, positions[None])
            half = self._head_size // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self._rotation = torch.stack([cos[0], signed[0]])[:, :, None]
        pieces = [self._rotation[:, start : start + n] for start in starts]
        cos, sin = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).unbind()
        return cos, sin


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)
