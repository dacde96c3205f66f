"""How demonstrations read and where they stand."""

from __future__ import annotations

import pytest
from cascade_fakes import demonstration
from refusals import refusal

from accel.methods.cascade.prompt import Layout, rendered, situation_of, with_demonstrations
from accel.methods.cascade.store import Demonstration, Found, Situation, Step

WHOLE = Found(demonstration("boil an egg", "heat", "wait", plan="be patient"), 0, 0, 2, 0.9)
PART = Found(Demonstration("paint", tuple(Step(f"see {n}", f"do {n}") for n in range(4))), 2, 1, 3, 0.5)


def test_what_a_student_reads():
    assert rendered([WHOLE, PART]) == (
        "Here are examples of how similar tasks were solved.\n"
        "\n"
        "Example 1\n"
        "Task: boil an egg\n"
        "Plan: be patient\n"
        "Observation: see heat\n"
        "Reasoning: because heat\n"
        "Action: heat\n"
        "Observation: see wait\n"
        "Reasoning: because wait\n"
        "Action: wait\n"
        "\n"
        "Example 2\n"
        "Task: paint\n"
        "(steps 2 to 3 of 4)\n"
        "Observation: see 1\n"
        "Action: do 1\n"
        "Observation: see 2\n"
        "Action: do 2\n"
        "\n"
        "End of the examples. Follow them closely: answer in the same way."
    )


def test_a_layout_of_ones_own():
    layout = Layout(opening="", closing="", goal="", plan="P", observation=">", reasoning="#", action="$")
    assert rendered([PART], layout).splitlines()[:4] == ["Example 1", "paint", "(steps 2 to 3 of 4)", "> see 1"]
    assert "place='assistant'" in refusal(lambda: Layout(place="assistant"))


@pytest.mark.parametrize(
    ("place", "messages", "expected"),
    [
        ("system", ["user:q"], ["system:DEMO", "user:q"]),
        (
            "system",
            ["system:s", "user:q", "assistant:a", "user:r"],
            ["system:s\n\nDEMO", "user:q", "assistant:a", "user:r"],
        ),
        ("user", ["system:s", "user:q", "user:r"], ["system:s", "user:DEMO\n\nq", "user:r"]),
        ("user", ["assistant:a"], ["user:DEMO", "assistant:a"]),
    ],
)
def test_where_they_stand(place, messages, expected):
    def parsed(texts):
        return [dict(zip(("role", "content"), text.split(":", 1), strict=True)) for text in texts]

    layout = Layout(place=place)
    given = parsed(messages)
    text = rendered([WHOLE], layout)
    assert with_demonstrations(given, [WHOLE], layout) == parsed([e.replace("DEMO", text) for e in expected])
    assert given == parsed(messages), "the caller's messages were changed"
    assert with_demonstrations(given, [], layout) == given


def test_steps_as_turns_with_the_most_similar_last():
    given = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    made = with_demonstrations(given, [WHOLE, PART], Layout(place="turns"), shorten=str.upper)
    assert made == [
        given[0],
        {"role": "user", "content": "Task: paint\nObservation: SEE 1\nAction:"},
        {"role": "assistant", "content": "do 1"},
        {"role": "user", "content": "Task: paint\nObservation: SEE 2\nAction:"},
        {"role": "assistant", "content": "do 2"},
        {"role": "user", "content": "Task: boil an egg\nPlan: be patient\nObservation: SEE HEAT\nAction:"},
        {"role": "assistant", "content": "because heat\nAction: heat"},
        {"role": "user", "content": "Task: boil an egg\nPlan: be patient\nObservation: SEE WAIT\nAction:"},
        {"role": "assistant", "content": "because wait\nAction: wait"},
        given[1],
    ]
    assert with_demonstrations(given[1:], [PART], Layout(place="turns"))[-1] == given[1]
    assert len(with_demonstrations(given[1:], [PART], Layout(place="turns"))) == 5


def test_observations_can_be_shortened_and_actions_not():
    text = rendered([WHOLE], shorten=str.upper)
    assert "Observation: SEE HEAT" in text and "Action: heat" in text and "Reasoning: because heat" in text


def test_where_a_conversation_stands():
    user, other = {"role": "user", "content": "g"}, {"role": "assistant", "content": "a"}
    assert situation_of([user]) == Situation(observation="g")
    assert situation_of([user, other, {"role": "user", "content": "o"}]) == Situation(goal="g", observation="o")
    assert situation_of([other]) == Situation()
