"""Two drafters as one: the first is asked for every row, the second for rows where the first is not confident.

Knows nothing of either but the Drafter protocol; meant for a free one in front of one that costs something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from accel.drafters.base import Ask, Beside, Draft, Drafter, leaves, open_row
from accel.errors import OptionError
from accel.models.row_cache import Segment


class CascadeDrafter:
    """Keeps ``first``'s guess where its first token's confidence is at least ``threshold``, else asks ``then``.

    Where ``then`` has no guess, ``first``'s stands. Both observe every token; ``Draft.source`` names the one that
    drafted. The confidences of the two are not compared with each other, so they need not be on one scale.
    """

    def __init__(self, first: Drafter, then: Drafter, threshold: float = 0.6, name: str = "cascade") -> None:
        if not 0 <= threshold <= 1:
            raise OptionError(f"threshold={threshold}: must be in [0, 1], the confidence above which `first` is used")
        if first is then:
            raise OptionError(f"both drafters of the cascade are the same {first.name!r} object: give two drafters")
        self.name = name
        self.first = first
        self.then = then
        self.parts = (first, then)
        self.threshold = threshold
        self.free = first.free and then.free

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        self.open_behind((), row, prompt, seed)

    def open_behind(self, segments: Sequence[Segment], row: int, prompt: Sequence[int], seed: int) -> None:
        open_row(self.first, segments, row, prompt, seed)
        try:
            open_row(self.then, segments, row, prompt, seed)
        except BaseException:
            # Half an open row could be neither opened again nor closed
            self.first.close(row)
            raise

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        drafts = [_signed(draft, self.first) for draft in self.first.propose(asks)]
        unsure = [i for i, draft in enumerate(drafts) if not self._confident(draft) and self._may_ask(asks[i])]
        if unsure:
            for i, draft in zip(unsure, self.then.propose([asks[i] for i in unsure]), strict=True):
                if draft.tokens:
                    draft = _signed(draft, self.then)
                    drafts[i] = _beside(draft, drafts[i]) if asks[i].beside else draft
        return drafts

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self.first.observe(row, tokens)
        self.then.observe(row, tokens)

    def close(self, row: int) -> None:
        try:
            self.first.close(row)
        finally:
            self.then.close(row)

    def state_bytes(self) -> int:
        return self.first.state_bytes() + self.then.state_bytes()

    def _may_ask(self, ask: Ask) -> bool:
        """Whether ``then`` may be asked; a cascade in its place decides for its own parts."""
        return not ask.free_only or any(leaf.free for leaf in leaves(self.then))

    def _confident(self, draft: Draft) -> bool:
        return bool(draft.tokens and draft.confidence) and draft.confidence[0] >= self.threshold


def _beside(draft: Draft, other: Draft) -> Draft:
    """``draft``, and as one more possibility what ``other`` would have begun with."""
    if not other.tokens or not other.confidence or other.tokens[0] == draft.tokens[0]:
        return draft
    rest = [each for each in draft.beside if (each.depth, each.token) != (0, other.tokens[0])]
    return replace(draft, beside=[*rest, Beside(0, other.tokens[0], other.confidence[0], other.source)])


def _signed(draft: Draft, drafter: Drafter) -> Draft:
    """The draft with its source named; a drafter that is itself a cascade has named it already."""
    return draft if draft.source else replace(draft, source=drafter.name)
