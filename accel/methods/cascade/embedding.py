"""Texts → unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Embedder(Protocol):
    name: str
    digest: str
    size: int

    def embed(self, texts: Sequence[str]) -> Tensor: ...
