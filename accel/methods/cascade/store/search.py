"""The best windows by their average similarity over several fields: a scan in 8 bits, settled in full precision.

Knows vectors, rows and masks. Does not know what they stand for, or where they are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.similarity import MAX_K, top_k

# rows that are settled at first, and at most before ties of the scan are taken as they come
SETTLE, SETTLE_MOST = 512, 8192


class Column:
    """Unit vectors of one field, each text once: fp16 as they are stored, and 8 bits with a scale for the scan."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._exact = torch.empty(0, size, dtype=torch.float16)
        self._rounded = torch.empty(0, size, dtype=torch.int8)
        self._scales = torch.empty(0, dtype=torch.bfloat16)

    def __len__(self) -> int:
        return self._count

    def append(self, vectors: Tensor) -> None:
        """vectors fp16 [n, D]. What readers were handed before stays as it is."""
        wanted = self._count + len(vectors)
        if wanted > len(self._exact):
            room = max(wanted, 2 * len(self._exact), 64)
            self._exact, self._rounded, self._scales = (
                torch.cat([old[: self._count], old.new_empty(room - self._count, *old.shape[1:])])
                for old in (self._exact, self._rounded, self._scales)
            )
        wide = vectors.float()
        # the scale as it will be read: rounding to it afterwards would be a second error
        scales = (wide.abs().amax(1) / 127).clamp_min(1e-9).bfloat16()
        span = slice(self._count, wanted)
        self._exact[span] = vectors
        self._rounded[span] = (wide / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._scales[span] = scales
        self._count = wanted

    def view(self) -> ColumnView:
        n = self._count
        return ColumnView(self._exact[:n], self._rounded[:n], self._scales[:n])


@dataclass(frozen=True)
class ColumnView:
    """A column as it was: exact fp16 [n, D], rounded int8 [n, D], scales bf16 [n]."""

    exact: Tensor
    rounded: Tensor
    scales: Tensor

    def scan(self, query: Tensor) -> Tensor:
        """query fp32 [D] → about the similarities, fp32 [n]."""
        if not len(self.exact):
            return torch.empty(0)
        if not _scans_in_8_bits():
            return (self.exact @ query.half()).float()
        scores = torch._weight_int8pack_mm(query.bfloat16()[None], self.rounded, self.scales)
        return scores[0].float()

    def settle(self, query: Tensor, rows: Tensor) -> Tensor:
        """query fp32 [D], rows int64 [m], −1 for none → similarities, fp32 [m], 0 for none."""
        if not len(self.exact):
            return torch.zeros(len(rows))
        scores = self.exact[rows.clamp_min(0)].float() @ query
        return scores.masked_fill(rows < 0, 0.0)


@dataclass(frozen=True)
class Fields:
    """What a search reads: a view of each field's column, and which of its rows each window has.

    ``rows[name]`` int64 [W]; −1 where the window has no such text, whose similarity then is 0: that of texts that have
    nothing to do with each other. So what a window scores depends on nothing else in the store.
    """

    columns: Mapping[str, ColumnView]
    rows: Mapping[str, Tensor]

    def ranked(self, queries: Mapping[str, Tensor], allowed: Tensor) -> Iterator[tuple[int, float]]:
        """queries: unit vectors fp32 [D] by field; allowed bool [W] → (window, score), the best first.

        The score is the average of the fields asked for. As many are settled as the reader takes: the scan says which
        may matter, and the largest error it made on those says how far to look.
        """
        scanned = torch.zeros(len(allowed))
        for name, query in queries.items():
            rows = self.rows[name]
            scores = torch.cat([self.columns[name].scan(query), torch.zeros(1)])  # the last is for row −1
            scanned += scores[rows]
        scanned = (scanned / len(queries)).masked_fill(~allowed, -torch.inf)
        most, size = int(allowed.sum()), SETTLE
        handed: set[int] = set()
        while len(handed) < most:
            size = min(size, most)
            rough, windows = scanned.topk(size)
            settled = sum(
                (self.columns[name].settle(query, self.rows[name][windows]) for name, query in queries.items()),
                torch.zeros(size),
            ) / len(queries)
            bound = -torch.inf
            if size < most and (size < SETTLE_MOST or len(handed) >= SETTLE_MOST):
                bound = float(rough[-1] + (settled - rough).abs().max())
            for score, window in _in_order(settled, windows):
                if score <= bound:
                    break
                if window not in handed:
                    handed.add(window)
                    yield window, score
            size *= 4


class Table:
    """The same search where the ``similarity`` kernels are: every window's fields side by side in one row."""

    def __init__(self, fields: Fields, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        parts = []
        for name in names:
            exact = fields.columns[name].exact
            # the last row is for windows without the field: zeros are similar to nothing
            padded = torch.cat([exact, exact.new_zeros(1, exact.shape[1])])
            parts.append(padded[fields.rows[name]])
        self._table = torch.cat(parts, 1).to(device)

    def ranked(self, queries: Mapping[str, Tensor], allowed: Tensor) -> Iterator[tuple[int, float]]:
        """As ``Fields.ranked``; 64 windows a call of the kernel."""
        size = self._table.shape[1] // len(self.names)
        parts = [queries.get(name, torch.zeros(size)) for name in self.names]
        query = torch.cat(parts).to(self._table)[None]
        exclude = (~allowed).to(self._table.device)
        left = int(allowed.sum())
        while left > 0:
            k = min(MAX_K, left)
            scores, windows = top_k(query, self._table, k, normalized=True, exclude=exclude)
            for score, window in zip(scores[0].tolist(), windows[0].tolist(), strict=True):
                yield window, score / len(queries)
            exclude[windows[0]] = True
            left -= k


def _in_order(scores: Tensor, windows: Tensor) -> list[tuple[float, int]]:
    """The best first, of equals the lower window."""
    return sorted(zip(scores.tolist(), windows.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))


@functools.cache
def _scans_in_8_bits() -> bool:
    """Whether this torch has the product of 8-bit rows that the scan uses, and it is right; fp16 otherwise."""
    query = torch.linspace(-1, 1, 32).bfloat16()[None]
    rows = torch.arange(-48, 48, dtype=torch.int8).reshape(3, 32)
    scales = torch.tensor([0.5, 1.0, 2.0]).bfloat16()
    try:
        found = torch._weight_int8pack_mm(query, rows, scales).float()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    wanted = (query.float() @ rows.float().T) * scales.float()
    return bool((found - wanted).abs().max() <= 0.01 * wanted.abs().max())
