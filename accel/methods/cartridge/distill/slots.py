"""Keys and values being trained: where they begin, how a model reads them with gradients, and what comes out.

Knows tensors and transformers' cache. Does not know documents' texts, lessons or losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from accel.errors import OptionError, unknown_name
from accel.methods.cartridge import document
from accel.models.row_cache import Segment

STARTS = ("chunks", "first", "random")
# a stretch of the document that a "chunks" start takes in one piece
_STRETCH = 32


class Slots(nn.Module):
    """A segment as fp32 parameters; the first ``sink`` slots are kept as they are.

    A frozen sink keeps the model stable while it learns (Eyuboglu et al. 2025, section 4): attention that finds
    nothing of interest goes there.
    """

    def __init__(self, segment: Segment, sink: int) -> None:
        super().__init__()
        self.num_tokens, self.num_positions, self.sink = segment.num_tokens, segment.num_positions, sink
        self._frozen = [each[:, :sink].float() for each in (*segment.keys, *segment.values)]
        self.keys = nn.ParameterList([each[:, sink:].float().clone() for each in segment.keys])
        self.values = nn.ParameterList([each[:, sink:].float().clone() for each in segment.values])

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer, ``[Hkv, p, D]`` fp32, with their gradients."""
        trained = [*self.keys, *self.values]
        whole = [torch.cat([frozen, each], dim=1) for frozen, each in zip(self._frozen, trained, strict=True)]
        return whole[: len(self.keys)], whole[len(self.keys) :]

    @torch.no_grad()
    def segment(self, dtype: torch.dtype) -> Segment:
        """What was learned, as rows read it."""
        keys, values = self.tensors()
        return Segment(
            tuple(each.to(dtype) for each in keys), tuple(each.to(dtype) for each in values), self.num_positions
        )


def inputs(members: Sequence[Slots], tokens: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What a transformers model needs to read ``tokens`` [B, T], padded on the right, behind ``members``.

    transformers' own cache, mask and positions: the path of training is not the one that serves.
    """
    rows, width = tokens.shape
    columns = [each.tensors() for each in members]
    cache = DynamicCache()
    for layer in range(len(columns[0][0])):
        keys = torch.cat([keys[layer] for keys, _ in columns], dim=1).to(dtype)
        values = torch.cat([values[layer] for _, values in columns], dim=1).to(dtype)
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    device = tokens.device
    slots, offset = sum(each.num_tokens for each in members), sum(each.num_positions for each in members)
    return {
        "past_key_values": cache,
        # without it transformers takes a query longer than the cache for a prompt without one
        "attention_mask": torch.ones(rows, slots + width, dtype=torch.long, device=device),
        "position_ids": (offset + torch.arange(width, device=device)).expand(rows, -1),
    }


def begin(
    model: PreTrainedModel, document_ids: Sequence[int], tokens: int, start: str, sink: int, seed: int
) -> Segment:
    """``tokens`` slots to begin from, all at positions 0 … tokens - 1.

    "first": the document's first tokens (the paper's best). "chunks": its beginning, and pieces from evenly spread
    places, read as one text. "random": vectors of the size of the first tokens' own.
    """
    if start not in STARTS:
        raise OptionError(unknown_name("start", start, STARTS))
    if not 0 <= sink < tokens:
        raise OptionError(f"sink_tokens={sink}: must be from 0 to tokens - 1 = {tokens - 1}")
    if len(document_ids) < tokens:
        raise OptionError(
            f"tokens={tokens}: the document has only {len(document_ids)} with its template; ask for fewer"
        )
    if start == "chunks":
        return document.read(model, _spread(document_ids, tokens))
    segment = document.read(model, document_ids[:tokens])
    return segment if start == "first" else _scrambled(segment, sink, seed)


def _spread(ids: Sequence[int], tokens: int) -> list[int]:
    """``tokens`` ids: stretches from evenly spread places, the first and the last of the document among them."""
    count = math.ceil(tokens / _STRETCH)
    if count == 1:
        return list(ids[:tokens])
    sizes = [tokens // count + (1 if place < tokens % count else 0) for place in range(count)]
    chosen: list[int] = []
    for place, size in enumerate(sizes):
        start = round(place * (len(ids) - size) / (count - 1))
        chosen += ids[start : start + size]
    return chosen


def _scrambled(segment: Segment, sink: int, seed: int) -> Segment:
    """Random vectors with each layer's own deviation, behind the true sink."""
    generator = torch.Generator().manual_seed(seed)

    def draw(true: Tensor) -> Tensor:
        noise = torch.randn(true.shape, generator=generator).to(true)
        return torch.cat([true[:, :sink], noise[:, sink:] * true.float().std().to(true)], dim=1)

    return Segment(
        tuple(draw(each) for each in segment.keys), tuple(draw(each) for each in segment.values), segment.num_positions
    )
