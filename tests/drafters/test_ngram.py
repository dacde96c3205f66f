"""Prompt lookup against a scan of the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.drafters.base import Ask, Drafter
from accel.drafters.ngram import NgramDrafter
from accel.errors import AccelError

TEXT = st.lists(st.integers(0, 3), max_size=40)


def propose(drafter, row=0, max_tokens=8):
    return drafter.propose([Ask(row, max_tokens)])[0]


def by_scanning(text, max_ngram, min_ngram, max_tokens):
    """What prompt lookup means: try every n, then every place from the right."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if n <= len(text) and text[end - n : end] == text[len(text) - n :]:
                grown = list(text)
                for i in range(max_tokens):
                    grown.append(grown[end + i])
                return grown[len(text) :]
    return []


@given(TEXT, TEXT, st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_proposes_what_a_scan_would_find(prompt, output, low, more, max_tokens):
    drafter = NgramDrafter(max_ngram=low + more, min_ngram=low)
    drafter.open(0, prompt, seed=0)
    drafter.observe(0, output)
    draft = propose(drafter, max_tokens=max_tokens)
    assert draft.tokens == by_scanning(prompt + output, low + more, low, max_tokens)
    assert len(draft.confidence) == len(draft.tokens)
    assert draft.probs is None


def test_prefers_the_longest_then_the_most_recent():
    drafter = NgramDrafter()
    drafter.open(0, [1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], seed=0)
    assert propose(drafter, max_tokens=2).tokens == [9, 8]
    drafter.open(1, [1, 2, 3, 9, 1, 2, 3, 7, 1, 2, 3], seed=0)
    assert propose(drafter, row=1, max_tokens=2).tokens == [7, 1]


def test_a_loop_is_continued_past_the_end_of_the_text():
    drafter = NgramDrafter()
    drafter.open(0, [5, 1, 2, 1, 2], seed=0)
    assert propose(drafter, max_tokens=5).tokens == [1, 2, 1, 2, 1]


def test_confidence_grows_with_the_match_and_names_its_source():
    drafter = NgramDrafter()
    drafter.open(0, [1, 2, 3, 4, 1], seed=0)
    short = propose(drafter)
    drafter.observe(0, [2, 3])
    long = propose(drafter)
    assert 0 < short.confidence[0] < long.confidence[0] < 1
    assert (short.source, drafter.name, drafter.free) == ("ngram", "ngram", True)
    assert isinstance(drafter, Drafter)


def test_proposing_leaves_no_trace_and_rows_do_not_meet():
    drafter = NgramDrafter()
    drafter.open(3, [1, 2, 1], seed=0)
    drafter.open(5, [1, 7, 1], seed=0)
    for _ in range(2):
        drafts = drafter.propose([Ask(5, 1), Ask(3, 1)])
        assert [draft.tokens for draft in drafts] == [[7], [2]]


def test_memory_is_reported_and_given_back():
    drafter = NgramDrafter()
    drafter.open(0, range(10), seed=0)
    few = drafter.state_bytes()
    drafter.observe(0, range(100))
    assert drafter.state_bytes() > few > 0
    drafter.close(0)
    assert drafter.state_bytes() == 0


def test_the_index_grows_by_max_ngram_entries_a_token():
    drafter = NgramDrafter(max_ngram=3)
    drafter.open(0, range(1000), seed=0)
    thousand = drafter.state_bytes()
    drafter.observe(0, range(1000, 2000))
    assert drafter.state_bytes() == pytest.approx(2 * thousand, rel=0.01)


def test_rows_that_are_not_open_are_refused():
    drafter = NgramDrafter()
    drafter.open(4, [1], seed=0)
    with pytest.raises(AccelError, match="row 4 is already open in the ngram drafter"):
        drafter.open(4, [2], seed=0)
    with pytest.raises(AccelError, match=r"row 7 is not open .*open rows: 4"):
        propose(drafter, row=7)
    drafter.close(4)
    for use in (lambda: drafter.observe(4, [1]), lambda: drafter.close(4), lambda: propose(drafter, row=4)):
        with pytest.raises(AccelError, match=r"row 4 is not open .*open rows: none"):
            use()


@pytest.mark.parametrize("options", [{"min_ngram": 0}, {"max_ngram": 2, "min_ngram": 3}])
def test_impossible_lengths_are_refused(options):
    with pytest.raises(AccelError, match="1 ≤ min_ngram ≤ max_ngram"):
        NgramDrafter(**options)
