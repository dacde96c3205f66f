"""The suffix automaton and its drafter against brute force over small alphabets."""

from __future__ import annotations

import sys
from collections import Counter
from math import inf, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accel.drafters.automaton as automaton_module
from accel.drafters.automaton import LINKS_COUNTED, ROOT, SuffixAutomaton
from accel.drafters.base import Ask, Drafter
from accel.drafters.suffix import SuffixDrafter, belief
from accel.errors import AccelError

TEXT = st.lists(st.integers(0, 2), max_size=LINKS_COUNTED)
TEXTS = st.lists(TEXT, max_size=4)
MANY = settings(max_examples=200, deadline=None)


def propose(drafter, row=0, max_tokens=10):
    return drafter.propose([Ask(row, max_tokens)])[0]


def unbounded(**options):
    """A drafter that drafts as long as it is asked to."""
    return SuffixDrafter(max_spec_factor=inf, min_probability=0, **options)


def ends_of(part, text):
    """Where ``part`` ends in ``text``, as the number of tokens up to there."""
    return [end for end in range(len(part), len(text) + 1) if text[end - len(part) : end] == part]


def longest_match(text, places):
    """The length of the longest suffix of ``text`` that is inside one of ``places``."""
    return max(n for n in range(len(text) + 1) if any(ends_of(text[len(text) - n :], place) for place in places))


@given(TEXT)
@MANY
def test_the_repeated_suffix_is_the_longest_that_occurred_earlier(text):
    automaton = SuffixAutomaton()
    for size, token in enumerate(text, start=1):
        automaton.append(token)
        # an earlier occurrence is one inside the text without its last token
        expected = longest_match(text[:size], [text[: size - 1]])
        assert automaton.length[automaton.repeated_suffix()] == expected


@given(TEXT)
@MANY
def test_every_state_knows_how_often_and_where_it_occurred(text):
    automaton = SuffixAutomaton(text)
    assert len(automaton.link) <= max(2 * len(text), 2)
    for state in range(1, len(automaton.link)):
        end, length = automaton.end[state], automaton.length[state]
        ends = ends_of(text[end - length : end], text)
        assert (automaton.count[state], end) == (len(ends), ends[-1])


@given(TEXT)
@MANY
def test_the_follower_is_the_majority_and_the_most_recent_among_equals(text):
    automaton = SuffixAutomaton(text)
    state = automaton.repeated_suffix()
    if state == ROOT:
        return
    suffix = text[len(text) - automaton.length[state] :]
    earlier = ends_of(suffix, text)[:-1]
    votes = Counter(text[end] for end in earlier)
    latest = {text[end]: end for end in earlier}
    follower = automaton.follower(state)
    assert follower.token == max(votes, key=lambda token: (votes[token], latest[token]))
    assert (follower.agreeing, follower.seen) == (max(votes.values()), len(earlier))


@given(TEXT, TEXT)
@MANY
def test_another_text_is_matched_like_by_brute_force(text, other):
    automaton = SuffixAutomaton(text)
    state, matched = ROOT, 0
    for size, token in enumerate(other, start=1):
        state, matched = automaton.advance(state, matched, token)
        assert matched == longest_match(other[:size], [text])
        end = automaton.end[state]
        assert text[end - matched : end] == other[size - matched : size]


@given(TEXT, st.integers(0, 12))
@MANY
def test_each_token_follows_an_earlier_occurrence_of_the_whole_context(text, max_tokens):
    drafter = unbounded()
    drafter.open(0, text, seed=0)
    draft = propose(drafter, max_tokens=max_tokens)
    matched = longest_match(text, [text[:-1]])
    assert len(draft.tokens) == len(draft.confidence) == (max_tokens if matched else 0)
    grown = list(text)
    for token in draft.tokens:
        grown.append(token)
        matched += 1
        assert len(ends_of(grown[len(grown) - matched :], grown)) >= 2


@given(TEXT, TEXT, TEXTS)
@MANY
def test_observing_in_pieces_equals_opening_with_the_whole(prompt, output, corpus):
    pieces, whole = unbounded(corpus=corpus), unbounded(corpus=corpus)
    pieces.open(0, prompt, seed=0)
    for token in output:
        propose(pieces)
        pieces.observe(0, [token])
    whole.open(0, prompt + output, seed=1)
    assert propose(pieces) == propose(whole)
    assert pieces.state_bytes() == whole.state_bytes()


@given(TEXT, TEXTS)
@MANY
def test_the_corpus_is_used_where_it_matches_longer(text, corpus):
    drafter = unbounded(corpus=corpus)
    drafter.open(0, text, seed=0)
    draft = propose(drafter, max_tokens=6)
    own = longest_match(text, [text[:-1]])
    # a match that ends its sequence has nothing to propose, so the last token of each does not count
    there = longest_match(text, [sequence[:-1] for sequence in corpus] or [[]])
    if there <= own:
        alone = unbounded()
        alone.open(0, text, seed=0)
        # the corpus may match longer where nothing follows; then the shorter match is compared
        assert draft == propose(alone, max_tokens=6)
        return
    context = text[len(text) - there :] + draft.tokens
    assert draft.tokens
    assert any(ends_of(context, sequence) for sequence in corpus)


def test_a_match_never_crosses_two_sequences():
    drafter = unbounded(corpus=[[1, 2], [3, 4]])
    drafter.open(0, [1, 2], seed=0)
    assert propose(drafter).tokens == []
    drafter.open(1, [2, 3], seed=0)
    assert propose(drafter, row=1).tokens == [4]


def test_the_majority_wins_over_the_most_recent():
    drafter = unbounded()
    drafter.open(0, [1, 2, 3, 0, 1, 2, 3, 5, 1, 2, 4, 1, 2], seed=0)
    draft = propose(drafter, max_tokens=1)
    assert draft.tokens == [3]
    assert draft.confidence == [belief(2, 3, matched=2)]


def test_the_most_recent_wins_among_equals():
    drafter = unbounded()
    drafter.open(0, [1, 5, 1, 6, 1, 6, 0, 1, 5, 9, 1], seed=0)
    assert propose(drafter, max_tokens=1).tokens == [5]
    drafter.open(1, [1, 5, 1, 6, 0, 1, 5, 9, 1, 6, 8, 1], seed=0)
    assert propose(drafter, row=1, max_tokens=1).tokens == [6]


def test_all_copies_of_a_sequence_in_the_corpus_are_counted():
    copies = 2 * LINKS_COUNTED
    drafter = unbounded(corpus=[[1, 2, 3]] * copies)
    drafter.open(0, [1, 2], seed=0)
    assert propose(drafter, max_tokens=1).confidence == [belief(copies, copies, matched=2)]


def test_a_loop_is_continued_past_the_end_of_the_text():
    drafter = unbounded()
    drafter.open(0, [9, 1, 2, 3, 1, 2, 3], seed=0)
    assert propose(drafter, max_tokens=8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def test_belief_grows_with_the_context_and_with_agreement():
    assert belief(1, 1, matched=1) == pytest.approx(1 / 3)
    assert belief(1, 1, matched=1) < belief(1, 1, matched=2) < belief(1, 1, matched=20) < 1
    assert belief(1, 3, matched=2) < belief(2, 3, matched=2) < belief(3, 3, matched=2) < 1


def test_confidence_counts_the_tokens_drafted_so_far_as_context():
    drafter = unbounded()
    drafter.open(0, [1, 2, 3, 4, 1], seed=0)
    assert propose(drafter, max_tokens=3).confidence == [belief(1, 1, 1), belief(1, 1, 2), belief(1, 1, 3)]


def test_the_draft_is_bounded_by_the_match_the_ask_and_the_probability():
    text = [1, *range(10, 40), 1]
    for options, asked, expected in [
        ({"max_spec_factor": 3}, 10, 3),
        ({"max_spec_factor": 0.1}, 10, 1),
        ({"max_spec_factor": 3}, 2, 2),
        ({"min_match": 2}, 10, 0),
    ]:
        drafter = SuffixDrafter(**{"min_probability": 0, **options})
        drafter.open(0, text, seed=0)
        assert len(propose(drafter, max_tokens=asked).tokens) == expected
    everything = unbounded()
    everything.open(0, text, seed=0)
    careful = SuffixDrafter(max_spec_factor=inf, min_probability=0.05)
    careful.open(0, text, seed=0)
    full, cut = propose(everything, max_tokens=30).confidence, propose(careful, max_tokens=30).confidence
    assert cut == full[: len(cut)]
    assert prod(cut) >= 0.05 > prod(full[: len(cut) + 1])


def test_proposing_leaves_no_trace_and_rows_do_not_meet():
    drafter = SuffixDrafter()
    drafter.open(3, [1, 2, 1], seed=0)
    drafter.open(5, [1, 7, 1], seed=0)
    for _ in range(2):
        drafts = drafter.propose([Ask(5, 1), Ask(3, 1)])
        assert [draft.tokens for draft in drafts] == [[7], [2]]
    drafter.close(3)
    assert propose(drafter, row=5, max_tokens=1).tokens == [7]
    assert (drafts[0].source, drafts[0].probs, drafter.free) == ("suffix", None, True)
    assert isinstance(drafter, Drafter)


def test_memory_is_reported_and_given_back():
    drafter = SuffixDrafter(corpus=[[1, 2, 3]])
    corpus = drafter.state_bytes()
    drafter.open(0, range(100), seed=0)
    assert drafter.state_bytes() > 100 * 64 + corpus > corpus > 0
    drafter.close(0)
    assert drafter.state_bytes() == corpus


def test_rows_that_are_not_open_are_refused():
    drafter = SuffixDrafter()
    drafter.open(4, [1], seed=0)
    with pytest.raises(AccelError, match="row 4 is already open in the suffix drafter"):
        drafter.open(4, [2], seed=0)
    drafter.close(4)
    for use in (lambda: drafter.observe(4, [1]), lambda: drafter.close(4), lambda: propose(drafter, row=4)):
        with pytest.raises(AccelError, match=r"row 4 is not open .*open rows: none"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_spec_factor": 0}, "max_spec_factor=0: must be above 0"),
        ({"min_match": 0}, "min_match=0: must be ≥ 1"),
        ({"min_probability": 1.5}, r"min_probability=1.5: must be in \[0, 1\]"),
        ({"corpus": [[1], [2, -3]]}, "corpus sequence 1 holds the token -3"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AccelError, match=message):
        SuffixDrafter(**options)


def run_within(budget, work):
    """Do ``work`` and fail once it has executed ``budget`` lines of the automaton's module, whatever the machine."""
    count = 0

    def on_line(frame, event, arg):
        nonlocal count
        count += event == "line"
        assert count < budget, f"more than {budget} operations"
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: on_line if frame.f_code.co_filename == automaton_module.__file__ else None)
    try:
        work()
    finally:
        sys.settrace(before)
    assert count, "no line of the automaton was seen"


def thue_morse(size):
    return [i.bit_count() % 2 for i in range(size)]


@pytest.mark.parametrize(
    "make",
    [lambda n: [0] * n, lambda n: [0, 1] * (n // 2), lambda n: [0] * (n // 2) + [1] * (n // 2), thue_morse, range],
    ids=["loop", "alternating", "two blocks", "thue-morse", "all different"],
)
def test_building_takes_a_bounded_number_of_operations_a_token(make):
    # 5 lines each for LINKS_COUNTED suffixes, and about 40 for the rest; a quadratic build would take thousands
    size = 20_000
    run_within(size * (5 * LINKS_COUNTED + 60), lambda: SuffixAutomaton(make(size)))
