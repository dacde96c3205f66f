"""A tiny causal model whose tokens are bytes, live or as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def byte_llama(*, max_position_embeddings: int, initializer_range: float = 0.3) -> LlamaForCausalLM:
    """Two layers of 32, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_byte_llama(where: Path, **choices: float) -> Path:
    """The model and its tokenizer in a folder."""
    byte_llama(**choices).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return where
