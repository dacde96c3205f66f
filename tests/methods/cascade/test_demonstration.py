"""Demonstrations as lines of JSON: there and back, and what is refused."""

from __future__ import annotations

import pytest
from refusals import refusal

from accel.methods.cascade.store import Demonstration, Step

WHOLE = Demonstration(
    "boil an egg",
    (Step("a pot\nof wäter", "heat", "it is cold", {"observation": "pot"}), Step("steam", "add egg")),
    plan="heat, add",
    outcome=0.5,
    episode="kitchen-1",
    source="teacher:big",
    short={"goal": "egg"},
)


@pytest.mark.parametrize("made", [WHOLE, Demonstration("g", (Step("o", "a"),))])
def test_there_and_back(made):
    line = made.to_json()
    assert "\n" not in line
    assert Demonstration.from_json(line) == made


def test_found_by_short_texts_where_there_are_any():
    assert [WHOLE.found_by(name) for name in ("goal", "plan")] == ["egg", "heat, add"]
    assert [step.found_by("observation") for step in WHOLE.steps] == ["pot", "steam"]
    assert [step.found_by("reasoning") for step in WHOLE.steps] == ["it is cold", ""]


def test_a_digest_is_of_the_trajectory_and_its_outcome():
    base = Demonstration("g", (Step("o", "a"),))
    same = Demonstration("g", (Step("o", "a", short={"observation": "x"}),), episode="e", source="s", outcome=1)
    others = [
        Demonstration("h", (Step("o", "a"),)),
        Demonstration("g", (Step("o", "b"),)),
        Demonstration("g", (Step("o", "a", "r"),)),
        Demonstration("g", (Step("o", "a"),), plan="p"),
        Demonstration("g", (Step("o", "a"),), outcome=0.0),
        Demonstration("g", (Step("o", "a"), Step("o", "a"))),
    ]
    assert same.digest() == base.digest()
    assert len({base.digest(), *(other.digest() for other in others)}) == 7


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "x:3: not a line of JSON"),
        ("[]", "x:3: must be a JSON object"),
        ('{"goal": "g"}', "x:3: has no steps"),
        ('{"goal": "g", "steps": [], "more": 1}', "unknown field 'more'"),
        ('{"goal": "g", "steps": []}', "x:3: a demonstration needs one step"),
        ('{"goal": "g", "steps": {}}', "steps must be a list"),
        ('{"goal": 1, "steps": [{"observation": "o", "action": "a"}]}', "x:3: goal='1': must be a text"),
        ('{"goal": "g", "steps": [{"observation": "o"}]}', "x:3: step 0: has no action"),
        ('{"goal": "g", "steps": [{"observation": "o", "action": null}]}', "step 0: action='None'"),
        ('{"goal": "\\ud800", "steps": [{"observation": "o", "action": "a"}]}', "must be a text"),
        ('{"goal": "g", "episode": "", "steps": [{"observation": "o", "action": "a"}]}', "episode=''"),
        ('{"goal": "g", "outcome": NaN, "steps": [{"observation": "o", "action": "a"}]}', "outcome=nan"),
        ('{"goal": "g", "outcome": true, "steps": [{"observation": "o", "action": "a"}]}', "outcome=True"),
        ('{"goal": "g", "short": {"action": "x"}, "steps": [{"observation": "o", "action": "a"}]}', "goal or plan"),
        ('{"goal": "g", "outcome": 1e300, "steps": [{"observation": "o", "action": "a"}]}', "outcome=1e+300"),
        (f'{{"goal": "g", "outcome": {10**400}, "steps": [{{"observation": "o", "action": "a"}}]}}', "outcome=1000"),
    ],
)
def test_wrong_lines_are_refused_by_name(line, says):
    message = refusal(lambda: Demonstration.from_json(line, "x:3"))
    assert message.startswith("x:3") and says in message
