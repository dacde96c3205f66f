"""Dream read as the Qwen2 that it was made from: the same tensors under the same names, without causality.

Its logits are shifted by one position (a fact of the checkpoint, and the denoiser's business). Source: the
configuration and modelling code of DreamLM/Dream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config

from accel.models.diffusion.fields import Allowed, count, require, rope, stated

_DREAM: Allowed = {
    "hidden_act": ("silu", ("silu",)),
    "use_sliding_window": (False, (False,)),
    "use_mrope": (False, (False,)),
    "rope_scaling": (None, (None,)),
    # DreamReasoner decodes in blocks that see no later block: another model under the same name
    "block_size": (None, (None,)),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def dream_config(raw: Mapping[str, Any], where: str) -> Qwen2Config:
    """The Qwen2 of a Dream ``config.json``; ModelError for a Dream that is none."""
    require(raw, _DREAM, where)
    return Qwen2Config(
        **{size: count(raw, size, where) for size in _SIZES},
        rms_norm_eps=stated(raw, "rms_norm_eps", where),
        rope_parameters=rope(raw, where),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        hidden_act="silu",
        use_sliding_window=False,
    )
