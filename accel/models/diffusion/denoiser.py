"""A transformers model read in both directions: logits of chosen positions, and keys and values kept between blocks.

Causal classes are given a four-dimensional mask that hides padding and nothing else; masked-LM classes read in both
directions by themselves. Knows nothing of masks to fill, rules or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.models.diffusion.facts import DiffusionFacts


@dataclass
class BlockCache:
    """Keys and values of rows outside a block of each, as they were when ``Denoiser.open`` read the whole rows.

    ``start``, ``stop``: each row's block; ``lengths``: the rows' whole lengths. Approximate by nature: what is kept
    does not know what the block has become since.
    """

    start: list[int]
    stop: list[int]
    lengths: list[int]

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        raise NotImplementedError

    def select(self, rows: Sequence[int]) -> BlockCache:
        """Some of the rows, by their index, in the order given."""
        raise NotImplementedError

    @staticmethod
    def join(caches: Sequence[BlockCache]) -> BlockCache:
        """All rows of several caches in one, in their order, so that one forward pass serves them all."""
        raise NotImplementedError


class Denoiser:
    """Bidirectional logits of chosen positions; rows of different length in one batch.

    ModelError for a model that cannot be read without causality (it is tried when this is made).
    """

    vocab_size: int
    max_positions: int | None  # the longest row the model has positions for; None where there is no limit
    device: torch.device
    supports_cache: bool  # whether open() and logits_cached() may be used

    def __init__(self, model: PreTrainedModel, facts: DiffusionFacts) -> None:
        self.model, self.facts = model, facts
        raise NotImplementedError

    def logits(self, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the tokens at some positions of each row, from one forward pass over all rows.

        rows: int64 [T_r] each (prompt and canvas); at: int64 [L_r] each, positions whose token is asked for
        → [L_r, V] each, in the model's type. Shifted models are unshifted here: the logits of position p are those
        that the model gives at p - 1 (at 0: its own). Padding changes nothing.
        """
        raise NotImplementedError

    def open(
        self, rows: Sequence[Tensor], start: Sequence[int], stop: Sequence[int], *, dual: bool
    ) -> tuple[BlockCache, list[Tensor]]:
        """Read the rows whole, keep keys and values outside their blocks [start, stop), and answer for the blocks.

        ``dual``: what stands behind the block is kept too; else it is read again with it each time
        → (cache, logits [stop - start, V] each). IncompatibleError where the model has no cache.
        """
        raise NotImplementedError

    def logits_cached(self, cache: BlockCache, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """As ``logits``, reading only each row's block (not dual: from the block to the row's end).

        rows: the whole rows as they are now, in the cache's order; at: positions of the row, all in [start, stop).
        """
        raise NotImplementedError
