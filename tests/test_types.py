"""Stats add up, and unknown options are refused with the known ones."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from accel.errors import AccelError, OptionError
from accel.types import Stats, options_from


@dataclass(frozen=True)
class Options:
    size: int = 3
    name: str = "x"


def test_stats_of_three_rounds() -> None:
    stats = Stats(target_calls=3, generated_tokens=9)
    for drafted, accepted in ((4, 3), (2, 0), (5, 3)):
        stats.count(drafted, accepted)
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.row_calls) == (11, 6, 3)
    assert stats.drafted_by_position == [3, 3, 2, 2, 1]
    assert stats.accepted_by_position == [2, 2, 2]
    assert stats.acceptance_rate == pytest.approx(6 / 11)
    assert stats.mean_accepted_length == pytest.approx(1 + 6 / 3)
    assert stats.tokens_per_forward == pytest.approx(3.0)


def test_a_round_without_a_draft_counts_as_a_call() -> None:
    stats = Stats()
    stats.count(0, 0)
    stats.count(1, 1)
    assert (stats.row_calls, stats.drafted_by_position, stats.accepted_by_position) == (2, [1], [1])
    assert stats.mean_accepted_length == pytest.approx(1.5)


def test_stats_of_nothing() -> None:
    stats = Stats()
    assert stats.acceptance_rate is None
    assert stats.mean_accepted_length == 1.0
    assert stats.tokens_per_forward == 0.0


def test_discard_takes_back_and_never_more_than_there_is() -> None:
    stats = Stats()
    stats.count(4, 4)
    stats.discard(3, 4)
    assert stats.accepted_tokens == 1
    stats.discard(3, 4)
    assert stats.accepted_tokens == 0


def test_seconds_add_up_by_phase() -> None:
    stats = Stats()
    for phase, seconds in (("draft", 0.5), ("verify", 1.0), ("draft", 0.25)):
        stats.add_seconds(phase, seconds)
    assert stats.seconds == {"draft": 0.75, "verify": 1.0}


def test_stats_as_json_hold_fields_and_figures_and_are_a_copy() -> None:
    stats = Stats(method="speculative", notes=["one"])
    stats.count(2, 1)
    document = stats.as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["accepted_by_position"] == [1]
    assert (document["mean_accepted_length"], document["acceptance_rate"]) == (2.0, 0.5)
    document["notes"].append("two")
    assert stats.notes == ["one"]


def test_two_stats_share_nothing() -> None:
    first, second = Stats(), Stats()
    first.count(1, 1)
    first.notes.append("mine")
    assert second == Stats()


def test_options_from_names() -> None:
    assert options_from(Options, {"size": 7}, "method 'x'") == Options(7)
    assert options_from(Options, {}, "method 'x'") == Options()


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"^unknown option for method 'x': 'sise': choose from name, size$") as caught:
        options_from(Options, {"sise": 7}, "method 'x'")
    # both what the CLI catches and what a caller of a Python function expects
    assert isinstance(caught.value, AccelError)
    assert isinstance(caught.value, ValueError)
