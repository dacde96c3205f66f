"""The last inputs of independent rows, in the places that their cache gave them. Knows no layer and no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """The places of some rows: a slice where they are neighbours, so that nothing is copied, and as indices."""

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        self.list = list(slots)
        first = self.list[0]
        neighbours = self.list == list(range(first, first + len(self.list)))
        self.span = slice(first, first + len(self.list)) if neighbours else None
        self._device = device
        self._index: Tensor | None = None

    @property
    def index(self) -> Tensor:
        if self._index is None:
            self._index = torch.tensor(self.list, device=self._device)
        return self._index

    @property
    def key(self) -> slice | Tensor:
        return self.index if self.span is None else self.span

    def places(self, starts: Sequence[int], n: int) -> Tensor:
        """[R, n]: n places from each row's start."""
        return torch.tensor(starts, device=self._device)[:, None] + torch.arange(n, device=self._device)


class Line:
    """The last ``length`` inputs of each row and layer, and behind them those that are tentative.

    buffer [L, slots, length + capacity, …]
    """

    def __init__(self, buffer: Tensor, length: int) -> None:
        self.buffer, self.length = buffer, length

    def before(self, layer: int, slots: Slots, starts: Sequence[int]) -> Tensor:
        """What stands before the rows' next token, [R, length, …]: a view where rows allow it."""
        own = self.buffer[layer]
        if slots.span is not None and min(starts) == max(starts):
            return own[slots.span, starts[0] : starts[0] + self.length]
        return own[slots.index[:, None], slots.places(starts, self.length)]

    def write(self, layer: int, slots: Slots, starts: Sequence[int], new: Tensor) -> None:
        """Put new inputs [R, n, …] behind the rows' tentative ones."""
        own, n = self.buffer[layer], new.shape[1]
        if slots.span is not None and min(starts) == max(starts):
            own[slots.span, self.length + starts[0] : self.length + starts[0] + n] = new
        else:
            own[slots.index[:, None], self.length + slots.places(starts, n)] = new

    def put(self, layer: int, slots: Slots, history: Tensor) -> None:
        """Replace what is remembered by [R, length, …]."""
        self.buffer[layer, slots.key, : self.length] = history

    def shift(self, slots: Slots, keep: Sequence[int]) -> None:
        """Of the tentative inputs the first keep[r] stay: they move to the end of what is remembered."""
        if slots.span is not None and min(keep) == max(keep):
            kept = self.buffer[:, slots.span, keep[0] : keep[0] + self.length].clone()
        else:
            kept = self.buffer[:, slots.index[:, None], slots.places(keep, self.length)]
        self.buffer[:, slots.key, : self.length] = kept
