"""Who drafts which row, with stub drafters that record what they are told."""

from __future__ import annotations

import pytest

from accel.drafters.base import Ask, Beside, Draft, Drafter
from accel.drafters.cascade import CascadeDrafter
from accel.drafters.ngram import NgramDrafter
from accel.drafters.suffix import SuffixDrafter
from accel.errors import AccelError


class Stub:
    """Answers each row from a table of (tokens, first confidence)."""

    def __init__(self, name, answers=None, free=True, size=0):
        self.name, self.free, self.size = name, free, size
        self.answers = answers or {}
        self.calls = []
        self.refuses = False
        self.beside = []

    def open(self, row, prompt, seed):
        if self.refuses:
            raise RuntimeError("no room")
        self.calls.append(("open", row, list(prompt), seed))

    def propose(self, asks):
        self.calls.append(("propose", [ask.row for ask in asks]))
        drafts = []
        for ask in asks:
            tokens, confidence = self.answers.get(ask.row, ([], 0.0))
            drafts.append(Draft(list(tokens), confidence=[confidence] * len(tokens), beside=self.beside))
        return drafts

    def observe(self, row, tokens):
        self.calls.append(("observe", row, list(tokens)))

    def close(self, row):
        self.calls.append(("close", row))

    def state_bytes(self):
        return self.size


def test_rows_go_to_the_first_where_it_is_confident_and_to_the_second_otherwise():
    first = Stub("a", {1: ([10], 0.9), 2: ([20], 0.1), 4: ([40], 0.5)})
    then = Stub("b", {2: ([21], 0.3), 3: ([31], 0.3)})
    drafts = CascadeDrafter(first, then, threshold=0.5).propose([Ask(row, 4) for row in (3, 1, 2, 4)])
    assert [draft.tokens for draft in drafts] == [[31], [10], [21], [40]]
    assert [draft.source for draft in drafts] == ["b", "a", "b", "a"]
    assert then.calls == [("propose", [3, 2])]


def test_an_unsure_guess_stands_beside_the_seconds():
    first = Stub("a", {1: ([20, 9], 0.1), 2: ([30], 0.1), 3: ([50], 0.2)})
    then = Stub("b", {1: ([21], 0.3), 2: ([30], 0.3), 3: ([51], 0.3)})
    then.beside = [Beside(0, 50, 0.05), Beside(0, 60, 0.04)]
    asks = [Ask(1, 4, beside=2), Ask(2, 4, beside=2), Ask(3, 4, beside=2), Ask(1, 4)]
    drafts = CascadeDrafter(first, then, threshold=0.5).propose(asks)
    assert [draft.beside for draft in drafts] == [
        [*then.beside, Beside(0, 20, 0.1, "a")],
        # what both say first needs no second place
        then.beside,
        # of what both think of, the first drafter's belief stays: it is asked for here because it costs nothing
        [Beside(0, 60, 0.04), Beside(0, 50, 0.2, "a")],
        then.beside,
    ]


def test_a_second_that_costs_something_is_not_asked_by_rows_that_want_free_guesses_only():
    first, then = Stub("a", {1: ([10], 0.1), 2: ([20], 0.1)}), Stub("b", {1: ([11], 0.3), 2: ([21], 0.3)}, free=False)
    asks = [Ask(1, 4, free_only=True), Ask(2, 4)]
    assert [draft.tokens for draft in CascadeDrafter(first, then).propose(asks)] == [[10], [21]]
    nested = CascadeDrafter(Stub("c"), CascadeDrafter(first, then))
    assert [draft.source for draft in nested.propose(asks)] == ["a", "b"]
    free = Stub("b", {1: ([11], 0.3)})
    assert CascadeDrafter(first, free).propose(asks[:1])[0].tokens == [11]


def test_the_second_is_not_asked_when_every_row_is_settled():
    first, then = Stub("a", {1: ([10], 0.9)}), Stub("b")
    CascadeDrafter(first, then).propose([Ask(1, 4)])
    assert then.calls == []


def test_an_unsure_guess_stands_where_the_second_has_none():
    first, then = Stub("a", {1: ([10], 0.1)}), Stub("b")
    drafts = CascadeDrafter(first, then).propose([Ask(1, 4), Ask(2, 4)])
    assert [(draft.tokens, draft.source) for draft in drafts] == [([10], "a"), ([], "a")]


def test_asks_are_handed_on_as_they_are():
    received = []
    then = Stub("b")
    then.propose = lambda asks: received.extend(asks) or [Draft() for _ in asks]
    ask = Ask(1, 4, sample=True, warp=lambda logits: logits, keep_going=lambda confidences: True)
    CascadeDrafter(Stub("a"), then).propose([ask])
    assert received == [ask]


def test_both_see_every_token_whoever_drafted():
    first, then = Stub("a", {1: ([10], 0.9)}), Stub("b")
    cascade = CascadeDrafter(first, then)
    cascade.open(1, [5, 6], seed=7)
    cascade.propose([Ask(1, 4)])
    cascade.observe(1, [10, 11])
    cascade.close(1)
    told = [("open", 1, [5, 6], 7), ("observe", 1, [10, 11]), ("close", 1)]
    assert then.calls == told
    assert [call for call in first.calls if call[0] != "propose"] == told


def test_memory_adds_up_and_only_two_free_drafters_are_free():
    cascade = CascadeDrafter(Stub("a", size=3), Stub("b", free=False, size=40))
    assert (cascade.state_bytes(), cascade.free, cascade.name) == (43, False, "cascade")
    assert CascadeDrafter(Stub("a"), Stub("b")).free
    assert isinstance(cascade, Drafter)


def test_a_row_that_the_second_cannot_open_is_closed_in_the_first():
    first, then = SuffixDrafter(), Stub("b")
    then.refuses = True
    cascade = CascadeDrafter(first, then)
    with pytest.raises(RuntimeError, match="no room"):
        cascade.open(1, [5], seed=0)
    then.refuses = False
    cascade.open(1, [5], seed=0)


def test_real_drafters_cascade_and_nest():
    inner = CascadeDrafter(SuffixDrafter(), NgramDrafter(), threshold=0.6)
    cascade = CascadeDrafter(Stub("a"), inner)
    cascade.open(0, [1, 2, 3, 4, 1, 2, 3], seed=0)
    cascade.open(1, [1, 2, 1], seed=0)
    drafts = cascade.propose([Ask(0, 1), Ask(1, 1)])
    assert [(draft.tokens, draft.source) for draft in drafts] == [([4], "suffix"), ([2], "ngram")]
    cascade.close(0)
    with pytest.raises(AccelError, match="row 0 is not open"):
        inner.propose([Ask(0, 1)])


def test_impossible_cascades_are_refused():
    with pytest.raises(AccelError, match=r"threshold=1\.2: must be in"):
        CascadeDrafter(Stub("a"), Stub("b"), threshold=1.2)
    same = NgramDrafter()
    with pytest.raises(AccelError, match="both drafters of the cascade are the same 'ngram' object"):
        CascadeDrafter(same, same)
