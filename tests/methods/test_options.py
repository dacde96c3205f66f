"""Each refusal is one line with what was given and what is allowed."""

from __future__ import annotations

import pytest

from accel.errors import OptionError
from accel.methods.speculative.options import MAX_DRAFT_LENGTH, SpeculativeOptions
from accel.types import options_from

REFUSED = [
    ({"drafter": "llama"}, ["'llama'", "auto, cascade, lm, ngram, suffix"]),
    ({"drafter": None}, ["None", "auto, cascade, lm, ngram, suffix"]),
    ({"acceptance": "tree"}, ["'tree'", "auto, block, token"]),
    ({"draft_length": 0}, ["draft_length=0", "1 to 64", "'auto'", "method='plain'"]),
    ({"draft_length": -3}, ["draft_length=-3", "1 to 64"]),
    ({"draft_length": 65}, ["draft_length=65", "1 to 64"]),
    ({"draft_length": 2.5}, ["draft_length=2.5", "whole number from 1 to 64"]),
    ({"draft_length": "five"}, ["draft_length='five'", "whole number from 1 to 64", "'auto'"]),
    ({"draft_length": True}, ["draft_length=True", "whole number"]),
    ({"max_draft_length": 0}, ["max_draft_length=0", "1 to 64"]),
    ({"max_draft_length": "auto"}, ["max_draft_length='auto'", "whole number from 1 to 64"]),
    ({"lenience": 0.5}, ["lenience=0.5", "(rule, ε)", "None"]),
    ({"lenience": ("lin",)}, ["lenience=('lin',)", "(rule, ε)"]),
    ({"lenience": "li"}, ["lenience='li'", "(rule, ε)"]),
    ({"lenience": ("cube", 0.5)}, ["'cube'", "exp, lin, sq"]),
    ({"lenience": ("lin", 0)}, ["ε=0", "(0, 1]"]),
    ({"lenience": ("lin", 1.5)}, ["ε=1.5", "(0, 1]"]),
    ({"lenience": ("lin", float("nan"))}, ["ε=nan", "(0, 1]"]),
    ({"lenience": ("lin", "0.5")}, ["ε='0.5'", "number"]),
    ({"lenience": ("lin", True)}, ["ε=True", "number"]),
    ({"lenience": ("lin", 0.5), "acceptance": "block"}, ["acceptance='block'", "'token' or 'auto'"]),
    (
        {"gamma": 5},
        [
            "'gamma'",
            "method 'speculative'",
            "acceptance, draft_length, draft_steps, drafter, lenience, max_draft_length",
        ],
    ),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_a_refusal_is_one_line_that_says_what_is_allowed(given: dict, said: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        options_from(SpeculativeOptions, given, "method 'speculative'")
    message = str(caught.value)
    assert "\n" not in message
    assert message == message.strip()
    assert len(message) < 200
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"drafter": "ngram", "draft_length": 1},
        {"draft_length": MAX_DRAFT_LENGTH, "max_draft_length": MAX_DRAFT_LENGTH},
        {"acceptance": "block"},
        {"lenience": ("exp", 0.5), "acceptance": "token"},
    ],
    ids=str,
)
def test_what_is_allowed_is_taken(given: dict) -> None:
    options = SpeculativeOptions(**given)
    assert {name: getattr(options, name) for name in given} == given


def test_longest_draft_and_losslessness() -> None:
    assert SpeculativeOptions().longest_draft == 16
    assert SpeculativeOptions(max_draft_length=9).longest_draft == 9
    assert SpeculativeOptions(draft_length=3, max_draft_length=9).longest_draft == 3
    assert SpeculativeOptions().is_lossless
    assert SpeculativeOptions(lenience=("sq", 1)).is_lossless
    assert not SpeculativeOptions(lenience=("sq", 0.9)).is_lossless


def test_lenience_from_json_becomes_a_hashable_pair() -> None:
    options = SpeculativeOptions(lenience=["lin", 1])  # type: ignore[arg-type]
    assert options.lenience == ("lin", 1.0)
    assert isinstance(options.lenience[1], float)
    assert hash(options) == hash(SpeculativeOptions(lenience=("lin", 1.0)))
