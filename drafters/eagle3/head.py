"""The network of an EAGLE-3 head: target features and tokens in, hidden states and logits out. Knows no target.

A position pairs token x_{j+1} with feature g_j. The first layer attends over both, normalised each and side by side;
its residual is the feature alone. Any further layers are the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from accel.drafters.eagle3.config import HeadConfig
from accel.models.attention import using_rows
from accel.models.row_cache import RowCache, Step

FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": (Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
}


class PairLayer(nn.Module):
    """A decoder layer whose attention reads an embedding beside a feature, both ``[R, n, H]``."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        layer_class, norm_class, _ = FAMILIES[config.layer.model_type]
        plain, size = layer_class(config.layer, 0), config.layer.hidden_size
        self.self_attn = plain.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(plain.self_attn, name)
            setattr(plain.self_attn, name, nn.Linear(2 * size, old.out_features, bias=old.bias is not None))
        self.mlp = plain.mlp
        self.input_layernorm = plain.input_layernorm
        self.post_attention_layernorm = plain.post_attention_layernorm
        self.hidden_norm = norm_class(size, eps=config.layer.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def forward(self, embeds: Tensor, features: Tensor, **attention: Any) -> Tensor:
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        pair = torch.cat([self.input_layernorm(embeds), normed], dim=-1)  # [R, n, 2H]
        hidden = residual + self.self_attn(hidden_states=pair, **attention)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """Sizes: H the head's own hidden size, A · T the width of A hidden states of the target side by side."""

    def __init__(self, config: HeadConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        layer_class, norm_class, rotary_class = FAMILIES[config.layer.model_type]
        size, eps, width = config.layer.hidden_size, config.layer.rms_norm_eps, config.target_hidden_size
        # weights come from a checkpoint, the frequencies of the rotation from the config
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.layer.vocab_size, size)
            self.fc = nn.Linear(config.num_taps * width, size, bias=False)
            further = [layer_class(config.layer, i) for i in range(1, config.layer.num_hidden_layers)]
            self.layers = nn.ModuleList([PairLayer(config), *further])
            self.norm = norm_class(size, eps=eps)
            self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
            self.input_norm = norm_class(config.num_taps * width, eps=eps) if config.norm_before_fc else None
            norms = [norm_class(width, eps=eps) for _ in range(config.num_taps)] if config.fc_norm else None
            self.fc_norm = nn.ModuleList(norms) if norms else None
        with device:
            self.rotary = rotary_class(config.layer)

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """Hidden states of the target ``[..., A · T]`` → features ``[..., H]``."""
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            parts = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        projected: Tensor = self.fc(states)
        return projected

    @torch.no_grad()
    def forward(self, tokens: Tensor, features: Tensor, cache: RowCache, step: Step) -> Tensor:
        """Target ids ``[R, n]`` with features ``[R, n, H]`` → hidden states before the final norm ``[R, n, H]``."""
        first = torch.tensor(step.first_positions, device=tokens.device)
        positions = first[:, None] + torch.arange(step.n, device=tokens.device)
        attention = {
            "attention_mask": None,
            "past_key_values": cache,
            "position_embeddings": self.rotary(features, positions),
        }
        with using_rows(self.config.layer):
            hidden: Tensor = self.layers[0](self.embed_tokens(tokens), features, **attention)
            for layer in self.layers[1:]:
                hidden = layer(hidden, **attention)
        return hidden

    @torch.no_grad()
    def read_out(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[R, H]`` → logits ``[R, draft vocabulary]`` and the next draft step's features ``[R, H]``."""
        normed = self.norm(hidden)
        return self.lm_head(normed), normed if self.config.norm_output else hidden
