"""A token that stands for "not decided yet", for a model that never had one.

Knows a model's embeddings and its tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

# where the tokenizer has no mask token and nobody names one
MASK = "<|mask|>"


def mask_text(tokenizer: Any, named: str | None) -> str:
    """The text of the token: the one that was named, the tokenizer's own, or a new one."""
    own: str | None = tokenizer.mask_token
    return named or own or MASK


def mask_id(tokenizer: Any, text: str) -> int:
    """The id that the token has, or will have; nothing is changed."""
    known: dict[str, int] = tokenizer.get_vocab()
    return known[text] if text in known else len(tokenizer)


def add_mask_token(model: PreTrainedModel, tokenizer: Any, token: int, text: str) -> None:
    """Make ``text`` the tokenizer's mask token, and give the model a place for it where it has none.

    A new token begins as the mean of all others: like any of them, and the same in every run.
    """
    tokenizer.add_special_tokens({"mask_token": text})
    assert tokenizer.mask_token_id == token, "the id that was foretold"
    size = model.config.get_text_config(decoder=True).vocab_size
    if token < size:
        return
    model.resize_token_embeddings(max(len(tokenizer), token + 1), mean_resizing=False)
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [inside.weight] if outside is None or outside.weight is inside.weight else [inside.weight, outside.weight]
    with torch.no_grad():
        for weight in tables:
            weight[size:] = weight[:size].mean(0)
