"""An embedder without a model, and demonstrations that differ in known ways."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.methods.cascade.store import Demonstration, Step


class WordEmbedder:
    """Sums of one random vector a word: texts that share words are similar, others are not. Counts what it is asked."""

    name = "words"

    def __init__(self, size: int = 64, digest: str = "d0") -> None:
        self.size, self.digest = size, digest
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.stack([sum(map(self._word, text.split()), torch.zeros(self.size)) for text in texts])

    def _word(self, word: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(word.lower().encode()))
        return torch.randn(self.size, generator=generator)


def demonstration(goal: str, *actions: str, **changes: object) -> Demonstration:
    """Each step sees "see ACTION" and thinks "because ACTION"."""
    steps = tuple(Step(f"see {action}", action, f"because {action}") for action in actions or ("go",))
    return Demonstration(goal, steps, **changes)  # type: ignore[arg-type]
