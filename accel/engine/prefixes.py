"""Contexts that were read before: keys and values of token sequences, for prompts that begin like one of them.

Knows tokens, segments and bytes. Entries are whole sequences in order of use; a prompt takes the longest beginning that
it shares with any, so that a conversation's next turn and a common system message are the same thing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from accel.models.row_cache import Segment

# fewer tokens are read again sooner than they are looked up and copied
SHORTEST = 16


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first ``num_tokens`` tokens of a kept sequence, as ``Request.prefix`` wants them."""

    segment: Segment
    num_tokens: int


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: np.ndarray
    segment: Segment


class Prefixes:
    """At most ``max_bytes`` of contexts; the least recently used go first.

    ``realm``: whatever else a context depends on (the cartridges in front of it) or must not be shared beyond (a salt).
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[Hashable, _Entry]] = OrderedDict()
        self._next = 0
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def nbytes(self) -> int:
        return self._nbytes

    def find(self, realm: Hashable, prompt: Sequence[int]) -> Prefix | None:
        """The longest beginning of ``prompt`` that is kept, short of its last token, which has to be read."""
        best, key = 0, -1
        tokens = np.asarray(prompt[:-1])
        for name, (of, entry) in self._entries.items():
            if of == realm and (common := _common(entry.tokens, tokens)) > best:
                best, key = common, name
        if best < SHORTEST:
            return None
        self._entries.move_to_end(key)
        return Prefix(self._entries[key][1].segment, best)

    def covers(self, realm: Hashable, tokens: Sequence[int]) -> bool:
        """Whether ``tokens`` are the beginning of a kept sequence."""
        given = np.asarray(tokens)
        return any(of == realm and _common(entry.tokens, given) == len(given) for of, entry in self._entries.values())

    def keep(self, realm: Hashable, tokens: Sequence[int], segment: Segment) -> None:
        """Keep a context, in place of those that are beginnings of it."""
        size = segment.nbytes()
        if size > self.max_bytes or len(tokens) < SHORTEST:
            return
        given = np.asarray(tokens)
        shorter = [
            name
            for name, (of, entry) in self._entries.items()
            if of == realm and _common(entry.tokens, given) == len(entry.tokens)
        ]
        for name in shorter:
            self._drop(name)
        while self._nbytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[self._next] = realm, _Entry(given, segment)
        self._next += 1
        self._nbytes += size

    def clear(self) -> None:
        self._entries.clear()
        self._nbytes = 0

    def _drop(self, name: int) -> None:
        _, entry = self._entries.pop(name)
        self._nbytes -= entry.segment.nbytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
