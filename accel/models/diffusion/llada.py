"""LLaDA read as the Llama that it computes: its config's fields and its tensors' names.

LLaDA's block (``block_type`` "llama") is Llama's under OLMo's names, with rotary halves in the same order; only the
mask differs, and that is the denoiser's. iLLaDA already has Llama's names. Sources: modeling_llada.py and
configuration_llada.py of czg1225/dParallel; modeling_illada.py of GSAI-ML/iLLaDA-8B-Base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from accel.models.diffusion.fields import Allowed, count, require, rope, stated

# with what LLaDA's own config class takes for an absent field, and the values that make it a Llama
_LLADA: Allowed = {
    "block_type": ("sequential", ("llama",)),
    "block_group_size": (1, (1,)),
    "activation_type": ("swiglu", ("silu",)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "attention_layer_norm": (False, (False,)),
    "bias_for_layer_norm": (None, (None, False)),
    "include_bias": (False, (False,)),
    "include_qkv_bias": (False, (False,)),
    "input_emb_norm": (False, (False,)),
    "scale_logits": (False, (False,)),
    "multi_query_attention": (None, (None,)),
    "alibi": (False, (False,)),
    "rope": (False, (True,)),
}
_ILLADA: Allowed = {
    "hidden_act": ("silu", ("silu",)),
    "layer_norm_eps": (None, (None,)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "rope_scaling": (None, (None,)),
}
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "attn_out": "o_proj"}
_MLP = {"ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj"}
_IN_BLOCK = {
    **{theirs: f"self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    **{theirs: f"mlp.{ours}" for theirs, ours in _MLP.items()},
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
# outside the blocks ff_out is the head, and in a block the way out of the MLP
_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)")
PREFIX = "model.transformer."


def module_name(theirs: str) -> str | None:
    """The Llama module of a LLaDA module: ``model.transformer.blocks.3.attn_out`` → its ``o_proj``. None if none."""
    block = _BLOCK.fullmatch(theirs)
    if block is not None:
        inside = _IN_BLOCK.get(block[2])
        return None if inside is None else f"model.layers.{int(block[1])}.{inside}"
    return _OUTSIDE.get(theirs.removeprefix(PREFIX)) if theirs.startswith(PREFIX) else None


def llada_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """The Llama of a LLaDA ``config.json``; ModelError for a LLaDA that is no Llama."""
    require(raw, _LLADA, where)
    heads, width = count(raw, "n_heads", where), count(raw, "d_model", where)
    return LlamaConfig(
        # rows of the embedding; the tokenizer may know fewer tokens
        vocab_size=raw.get("embedding_size") or count(raw, "vocab_size", where),
        hidden_size=width,
        intermediate_size=raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * width,
        num_hidden_layers=count(raw, "n_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or heads,
        max_position_embeddings=raw.get("max_sequence_length", 1024),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10000.0))},
        tie_word_embeddings=raw.get("weight_tying", True),
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
    )


def illada_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """The Llama of an iLLaDA ``config.json``."""
    require(raw, _ILLADA, where)
    heads = count(raw, "num_attention_heads", where)
    return LlamaConfig(
        vocab_size=count(raw, "vocab_size", where),
        hidden_size=count(raw, "hidden_size", where),
        intermediate_size=count(raw, "intermediate_size", where),
        num_hidden_layers=count(raw, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        max_position_embeddings=count(raw, "max_position_embeddings", where),
        rms_norm_eps=stated(raw, "rms_norm_eps", where),
        rope_parameters=rope(raw, where),
        tie_word_embeddings=stated(raw, "tie_word_embeddings", where),
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
    )
