"""Agreement: what counts as the same, and early decisions against every possible outcome."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal

from accel.methods.cascade.agreement import Rule, after, code, comparison, exact, json_value, normalised

SAME = [
    (normalised, "Go to  the Kitchen.", "go to the kitchen"),
    (normalised, "“42”", "**42**"),
    (normalised, "ﬁne", "FINE"),
    (normalised, "ｶﾞ５", "ガ5"),
    (normalised, "„Go (north)!“", "go (north"),
    (json_value, '{"a": 1, "b": [true, null]}', '{ "b":[true,null],\n"a":1.0}'),
    (json_value, '```json\n{"a": 1}\n```', '{"a":1}'),
    (json_value, "[1, 2]", " [1,2] "),
    (code, "print(  'a' )  # say it", 'print("a")'),
    (code, "```python\nx = (1 +\n  2)\n```", "x=1+2"),
    (code, "x = u'a'", "x = 'a'"),
    (code, "if a:\n  f()", "if a:\n\tf()"),
]
DIFFERENT = [
    (exact, "a", "a "),
    (exact, "a", "A"),
    (normalised, "take apple 1", "take apple 2"),
    (normalised, "a b", "ab"),
    (normalised, ".5", "5"),
    (normalised, "<5", ">5"),
    (normalised, "!ready", "ready"),
    (normalised, "10²", "102"),
    (json_value, '{"a": 1}', '{"a": true}'),
    (json_value, '{"a": 1}', '{"a": "1"}'),
    (json_value, "[1, 2]", "[2, 1]"),
    (json_value, '{"a": []}', '{"a": {}}'),
    (json_value, "null", "false"),
    (code, "x = 1 + 2", "x = 2 + 1"),
    (code, "x = 1", "y = 1"),
    (code, "x = 1", "x = True"),
    (code, "if a:\n  f()\ng()", "if a:\n  f()\n  g()"),
]
INVALID = [
    (exact, ""),
    (exact, " \n"),
    (normalised, " ... "),
    (json_value, "{'a': 1}"),
    (json_value, ""),
    (json_value, "[" * 100_000),
    (json_value, "[NaN]"),
    (code, "print("),
    (code, "# nothing to do"),
    (code, ""),
    (code, "a\0b"),
    (code, "(" * 5_000),
    (code, "-" * 90_000 + "1"),
    (code, "x" * 100_001),
]


@pytest.mark.parametrize(("key", "one", "other"), SAME)
def test_the_same_said_differently(key, one, other):
    assert key(one) is not None and key(one) == key(other)


@pytest.mark.parametrize(("key", "one", "other"), DIFFERENT)
def test_what_differs(key, one, other):
    assert key(one) is not None and key(other) is not None and key(one) != key(other)


@pytest.mark.parametrize(("key", "text"), INVALID)
def test_what_is_invalid(key, text):
    assert key(text) is None


def test_an_action_behind_reasoning():
    key = after("Action:", normalised)
    assert key("I think so.\nAction: go north.") == key("Other thoughts. Action: x\nAction:  Go north")
    assert key("I think so: go north") is None
    assert key("Action:") is None
    assert "marker=''" in refusal(lambda: after(""))


def outcome(rule: Rule, texts: tuple[str, ...]) -> tuple[bool, str | None]:
    tally = rule.tally()
    for text in texts:
        tally.add(text)
    verdict = tally.verdict()
    return verdict.accepted, verdict.text


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_decided_as_soon_as_nothing_can_change_it_and_no_sooner(samples):
    # two letters more than samples: a letter that nobody used is always left; "" is invalid
    letters = ["", *"abcdef"[:samples]]
    for needed in range(1, samples + 1):
        rule = Rule(samples, needed / samples)
        assert rule.needed == needed
        for taken in range(samples + 1):
            for begun in itertools.product(letters, repeat=taken):
                # names do not matter: letters in the order of the alphabet are enough
                if list(dict.fromkeys(filter(None, begun))) != sorted(set(begun) - {""}):
                    continue
                outcomes = {
                    outcome(rule, (*begun, *rest)) for rest in itertools.product(letters, repeat=samples - taken)
                }
                tally = rule.tally()
                for text in begun:
                    tally.add(text)
                assert tally.decided() == (len(outcomes) == 1), (needed, begun, outcomes)
                if tally.decided():
                    assert outcomes == {(tally.verdict().accepted, tally.verdict().text)}


@given(st.integers(1, 7), st.data())
def test_fewest_is_what_a_decision_still_needs(samples, data):
    rule = Rule(samples, data.draw(st.integers(1, samples)) / samples)
    tally = rule.tally()
    for text in data.draw(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=samples)):
        tally.add(text)
    left = samples - tally.taken
    fewest = tally.fewest()
    assert (fewest == 0) == tally.decided()
    soonest = next(
        count
        for count in range(left + 1)
        if any(_decided(rule, tally, more) for more in itertools.combinations_with_replacement("abcdefghij", count))
    )
    assert fewest == soonest


def _decided(rule, tally, more):
    trial = rule.tally()
    texts = [""] * tally.taken
    for group in tally.groups:
        for number in group.members:
            texts[number] = group.text
    for text in (*texts, *more):
        trial.add(text)
    return trial.decided()


@pytest.mark.parametrize(
    ("rule", "texts", "accepted", "votes"),
    [
        (Rule(3), "aaa", "a", 3),
        (Rule(3), "aab", None, 2),
        (Rule(3, 2 / 3), "aba", "a", 2),
        (Rule(3, 0.5), "abb", "b", 2),
        (Rule(5, 0.6), "babab", "b", 3),
        (Rule(4, 0.5), "abab", "a", 2),
        (Rule(1), "a", "a", 1),
        (Rule(3, 2 / 3), ["", "", "a"], None, 1),
        (Rule(2), ["", ""], None, 0),
    ],
)
def test_majorities(rule, texts, accepted, votes):
    tally = rule.tally()
    for text in texts:
        tally.add(text)
    verdict = tally.verdict()
    assert (verdict.text, verdict.votes, verdict.taken) == (accepted, votes, rule.samples)
    assert tally.decided() and verdict.agreement == votes / len(texts)


def test_the_first_of_a_group_speaks_for_it():
    tally = Rule(3, 2 / 3, normalised).tally()
    for text in ("north", "Go south.", "go south"):
        tally.add(text)
    assert tally.verdict().text == "Go south."
    assert tally.verdict().as_dict() == {"accepted": True, "agreement": 2 / 3, "votes": 2, "taken": 3, "planned": 3}


def test_two_that_differ_end_a_unanimous_vote():
    tally = Rule(3).tally()
    assert tally.fewest() == 2
    tally.add("a")
    assert not tally.decided() and tally.fewest() == 1
    tally.add("b")
    assert tally.decided() and tally.fewest() == 0 and not tally.verdict().accepted


def test_a_users_own_function():
    close = Rule(3, 2 / 3, same=lambda a, b: abs(float(a) - float(b)) < 0.1)
    tally = close.tally()
    for text in ("2.0", "3.0", "2.05"):
        tally.add(text)
    assert tally.verdict().text == "2.0"
    by_length = Rule(3, 2 / 3, key=len).tally()
    for text in ("ab", "abc", "xy"):
        by_length.add(text)
    assert by_length.verdict().text == "ab"


def test_refusals():
    assert "samples=0" in refusal(lambda: Rule(0))
    assert "samples=2.0" in refusal(lambda: Rule(2.0))
    assert "threshold=0" in refusal(lambda: Rule(3, 0))
    assert "threshold=1.5" in refusal(lambda: Rule(3, 1.5))
    assert "exact, json, normalised" in refusal(lambda: comparison("fuzzy"))
    assert comparison("code") is code
    full = Rule(1).tally()
    full.add("a")
    assert "counted already" in refusal(lambda: full.add("a"))
