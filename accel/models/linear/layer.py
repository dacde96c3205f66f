"""Linear attention in the place of a layer's softmax attention (LAWCAT, arXiv 2509.18467; README of the method).

The projections are the layer's own modules; convs, feature maps and gate are this module's, in fp32 whatever the
model's type. Without rotary embedding, except where a window or the spec asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from accel.models.linear.memory import Projected, attend
from accel.models.linear.spec import Heads, LinearSpec
from accel.models.linear.state import LinearRowCache
from accel.models.linear.transformers_cache import Padding, cache_layer

# what the published training starts from: the conv passes its input on, the gate forgets little
TAP, CURRENT_TAP, GATE_DEVIATION = 0.001, 1.0, 0.006


class LinearAttention(nn.Module):
    """A decoder layer's attention: same call, same output. ``softmax``: the module that it stands in for.

    q_taps, k_taps [H, D, 4] (no k_taps: shared; neither: no conv), q_map, k_map [H, D, f], gate_down [r, hidden],
    gate_up [Hkv·K, r or hidden] and gate_bias [Hkv·K] (none of them without a gate), window_factors [H].
    """

    q_map: Tensor
    k_map: Tensor | None
    q_taps: Tensor | None
    k_taps: Tensor | None
    gate_down: Tensor | None
    gate_up: Tensor | None
    gate_bias: Tensor | None
    window_factors: Tensor | None

    def __init__(self, softmax: Any, spec: LinearSpec, index: int, padding: Padding) -> None:
        super().__init__()
        config = softmax.config
        heads = Heads.of(config)
        self.spec, self.heads, self.layer_idx, self.padding = spec, heads, index, padding
        # where this layer stands among the converted ones
        self.place = spec.layers.index(index)
        self.q_proj, self.k_proj = softmax.q_proj, softmax.k_proj
        self.v_proj, self.o_proj = softmax.v_proj, softmax.o_proj
        # qwen3 normalises each query and key
        self.q_norm, self.k_norm = getattr(softmax, "q_norm", None), getattr(softmax, "k_norm", None)
        for name in PARAMETERS:
            shape = parameter_shapes(spec, heads).get(name)
            value = None
            if shape is not None:
                zeros = torch.zeros(shape, dtype=torch.float32, device=softmax.q_proj.weight.device)
                value = nn.Parameter(zeros, requires_grad=False)
            self.register_parameter(name, value)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start values of a distillation; the maps are drawn as a linear layer's weights are."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("taps"):
                parameter.fill_(TAP)
                parameter[..., -1] = CURRENT_TAP
            elif name.endswith("map") or name in ("gate_down", "gate_up"):
                deviation = self.heads.width**-0.5 if name.endswith("map") else GATE_DEVIATION
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] → [B, T, hidden]. The padding of a call comes from ``padding``: ``attention_mask`` is made
        for softmax layers, and may be None, four-dimensional, or of another length."""
        x = self.project(hidden_states, position_embeddings)
        if isinstance(past_key_values, LinearRowCache):
            out = past_key_values.states.attend(self, x)
        elif past_key_values is not None:
            out = cache_layer(past_key_values, self.layer_idx).attend(self, x, self.padding.mask)
        else:
            out, _ = attend(self, x, None, mask=self.padding.mask)
        return self.o_proj(out.flatten(2)), None

    def project(self, hidden: Tensor, positions: tuple[Tensor, Tensor] | None) -> Projected:
        """[B, T, hidden] → queries, keys, values, gate logits and what a window reads."""
        width = (-1, self.heads.width)
        q, k, v = (each(hidden).unflatten(-1, width) for each in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotated_q = rotated_k = None
        if self.spec.needs_rotation:
            assert positions is not None, "the decoder hands every layer its rotations"
            rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *positions, unsqueeze_dim=2)
        return Projected(q, k, v, self._gate(hidden), rotated_q, rotated_k)

    def _gate(self, hidden: Tensor) -> Tensor | None:
        if self.gate_up is None or self.gate_bias is None:
            return None
        inner = hidden if self.gate_down is None else F.linear(hidden, self.gate_down.to(hidden.dtype))
        logits = F.linear(inner, self.gate_up.to(hidden.dtype), self.gate_bias.to(hidden.dtype))
        return logits.unflatten(-1, (self.heads.keys, -1))


PARAMETERS = ("q_taps", "k_taps", "q_map", "k_map", "gate_down", "gate_up", "gate_bias", "window_factors")


def parameter_shapes(spec: LinearSpec, heads: Heads) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer with their shapes; what is shared stands under the query's name alone."""
    taps = (heads.queries, heads.width, spec.conv_width)
    maps = (heads.queries, heads.width, spec.feature_size)
    channels = heads.keys * 2 * spec.feature_size
    shapes: dict[str, tuple[int, ...]] = {"q_map": maps}
    if not spec.tie_maps:
        shapes["k_map"] = maps
    if spec.conv_width:
        shapes["q_taps"] = taps
        if not spec.share_conv:
            shapes["k_taps"] = taps
    if spec.gate_rank:
        shapes["gate_down"] = (spec.gate_rank, heads.hidden)
    if spec.gate_rank != 0:
        shapes["gate_up"] = (channels, spec.gate_rank or heads.hidden)
        shapes["gate_bias"] = (channels,)
    if spec.window or spec.affine:
        shapes["window_factors"] = (heads.queries,)
    return shapes
