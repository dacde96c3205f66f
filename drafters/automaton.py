"""An online suffix automaton over tokens: every substring seen so far, with counts. Knows nothing of drafting.

A state stands for the substrings that end at the same set of positions; its suffix link leads to its longest
suffix that ends at more positions (Blumer et al. 1985). The state of the whole text occurs once, so its link is
the longest suffix of the text that occurred earlier.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Counts are kept on the longest LINKS_COUNTED repeated suffixes of each token. Prose nests 2 or 3 deep; a loop such
# as "a a a a" nests as deep as it is long, and counting all of it would make the loop quadratic.
LINKS_COUNTED = 32

ROOT = 0

# For state_bytes: five list slots, two boxed numbers and a dict of a few entries
BYTES_PER_STATE = 5 * 8 + 2 * 32 + 184


class Follower(NamedTuple):
    """The ``token`` that most often followed a state, the state after it, and how often: ``agreeing`` of ``seen``."""

    token: int
    state: int
    agreeing: int
    seen: int


class SuffixAutomaton:
    """Lists indexed by state: ``next`` (token → state), ``link``, ``length``, ``count`` and ``end``.

    ``length[s]`` is that of the longest substring of s, ``count[s]`` how often it occurred, and ``end[s]`` the
    number of tokens up to the end of its most recent occurrence, so that ``tokens[end[s]]`` is what followed it.
    ``count`` and ``end`` are exact for the ``LINKS_COUNTED`` longest repeated suffixes at each token; shorter ones
    inside a loop may keep those of an earlier occurrence. Negative tokens are separators: no substring is worth
    matching across one, so ``follower`` never names one.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link: list[int] = [-1]
        self.length: list[int] = [0]
        self.count: list[int] = [0]
        self.end: list[int] = [0]
        self.last = ROOT
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Extend the text by one token: amortised constant time."""
        self.tokens.append(token)
        whole = self._new_state(len(self.tokens), {}, ROOT, count=1, end=len(self.tokens))
        following, link = self.next, self.link
        state = self.last
        while state >= ROOT and token not in following[state]:
            following[state][token] = whole
            state = link[state]
        if state >= ROOT:
            known = following[state][token]
            if self.length[known] != self.length[state] + 1:
                known = self._split(state, token, known)
            link[whole] = known
        self.last = whole
        self._count_suffixes(link[whole])

    def repeated_suffix(self) -> int:
        """The state of the longest suffix of the text that occurred earlier; ROOT where none did."""
        return max(self.link[self.last], ROOT)

    def follower(self, state: int) -> Follower | None:
        """The majority continuation of ``state``, the more recent one among equals; None where nothing followed.

        It looks at every distinct token that followed the state: one or two after a few tokens of context.
        """
        count, end = self.count, self.end
        best = best_state = most = latest = seen = 0
        for token, target in self.next[state].items():
            if token < 0:
                continue
            times = count[target]
            seen += times
            if times > most or (times == most and end[target] > latest):
                best, best_state, most, latest = token, target, times, end[target]
        return Follower(best, best_state, most, seen) if seen else None

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Match one more token of another text: the longest suffix of (matched + token) that occurs here.

        ``state`` and ``length`` are what was matched so far; both new values come back, (ROOT, 0) for no match.
        """
        following, link = self.next, self.link
        while token not in following[state]:
            if state == ROOT:
                return ROOT, 0
            state = link[state]
            length = self.length[state]
        return following[state][token], length + 1

    def state_bytes(self) -> int:
        """An estimate of the memory held, from the number of states (at most two a token)."""
        return len(self.link) * BYTES_PER_STATE + len(self.tokens) * 8

    def _new_state(self, length: int, following: dict[int, int], link: int, count: int, end: int) -> int:
        self.next.append(following)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        self.end.append(end)
        return len(self.link) - 1

    def _split(self, state: int, token: int, known: int) -> int:
        """Give the suffix that now also ends here its own state, apart from the longer ones in ``known``."""
        following, link = self.next, self.link
        part = self._new_state(
            self.length[state] + 1, following[known].copy(), link[known], self.count[known], self.end[known]
        )
        link[known] = part
        while state >= ROOT and following[state].get(token) == known:
            following[state][token] = part
            state = link[state]
        return part

    def _count_suffixes(self, state: int) -> None:
        count, end, link = self.count, self.end, self.link
        size = len(self.tokens)
        for _ in range(LINKS_COUNTED):
            if state <= ROOT:
                return
            count[state] += 1
            end[state] = size
            state = link[state]
