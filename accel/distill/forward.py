"""Logits at chosen positions of a padded batch, without those of all the others.

Knows a causal language model of transformers. Does not know lessons, vocabularies or losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PROBE = 4


class Scorer:
    """A model's logits where they are wanted.

    The head costs a small draft most of its time, and prompts need no logits: so it is applied to the chosen rows of
    the hidden states. Models that do more than multiply at the end (soft caps, scales) are run whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.plain_head = _has_plain_head(model)

    def __call__(self, tokens: Tensor, at: Tensor, **inputs: Any) -> Tensor:
        """tokens [B, T], padded on the right; at [N], flat places row · T + column → logits fp32 [N, V].

        ``inputs``: what else the model is to be given (a cache in front of the tokens, positions).
        """
        if not self.plain_head:
            return self.model(input_ids=tokens, use_cache=False, **inputs).logits.flatten(0, 1)[at].float()
        return self._head(self._hidden(tokens, at, **inputs)).float()

    @torch.no_grad()
    def pieces(self, tokens: Tensor, at: Tensor, rows: int = 256, **inputs: Any) -> Iterator[Tensor]:
        """The same without gradients, at most ``rows`` places at a time: a large vocabulary's logits fill memory."""
        if not self.plain_head:
            yield from self(tokens, at, **inputs).split(rows)
            return
        for part in self._hidden(tokens, at, **inputs).split(rows):
            yield self._head(part).float()

    def _hidden(self, tokens: Tensor, at: Tensor, **inputs: Any) -> Tensor:
        hidden = self.model.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state  # [B, T, D]
        return hidden.flatten(0, 1)[at]

    def _head(self, hidden: Tensor) -> Tensor:
        head: Callable[[Tensor], Tensor] = self.model.get_output_embeddings()
        return head(hidden)


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Whether head(hidden states) are the logits; asked of the model itself, as every family names its own extras.

    To the last bit: what a soft cap does to the small logits of a fresh student is no more than rounding.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    training = model.training
    tokens = torch.arange(_PROBE, device=model.device)[None] % len(head.weight)
    try:
        model.eval()
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    finally:
        model.train(training)
    return torch.equal(parts, whole)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on a GPU and on a CPU that multiplies it; on another CPU it would cost more than it saves."""
    if device.type == "cuda" or _multiplies_bf16():
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
