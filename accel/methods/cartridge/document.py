"""A whole document as a cartridge: its own keys and values, read once. Exact, and as large as the document.

What every smaller cartridge is measured against, and what ``accel artifact verify`` proves the runtime with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.errors import OptionError
from accel.methods.cartridge.cartridge import Cartridge, Document
from accel.methods.cartridge.template import document_ids
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

# tokens read at a time: bounds the scores of a long prefill
CHUNK = 1024


def read(model: PreTrainedModel, tokens: Sequence[int]) -> Segment:
    """Keys and values of ``tokens`` as the model computes them at positions 0, 1, …"""
    if not tokens:
        raise OptionError("an empty document: a cartridge needs at least one token")
    target = SoftmaxTarget(model)
    if target.max_positions is not None and len(tokens) > target.max_positions:
        raise OptionError(
            f"the document has {len(tokens)} tokens, the model {target.max_positions} positions: split the document"
        )
    row = target.open()
    for start in range(0, len(tokens), CHUNK):
        part = torch.tensor([list(tokens[start : start + CHUNK])], device=target.device)
        target.forward(part, [row], keep=[part.shape[1] - 1])
        target.commit([part.shape[1]], [row])
    target.cache.freeze(row)
    (segment,) = target.cache.rows[row].segments
    return segment


def whole(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    template: str = "system",
    instruction: str = "",
) -> Cartridge:
    """The exact cartridge of a text: the same logits as the text in the prompt, for the memory of all of it."""
    ids = document_ids(tokenizer, text, template, instruction)
    return Cartridge.of(
        name,
        read(model, ids),
        model,
        tokenizer,
        method="whole",
        template=template,
        instruction=instruction,
        documents=(describe(text, len(ids)),),
        exact=True,
    )


def describe(text: str, num_tokens: int) -> Document:
    return Document(hashlib.sha256(text.encode()).hexdigest(), num_tokens)
