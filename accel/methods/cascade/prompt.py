"""Demonstrations in front of a student's question. Knows texts and messages; not who answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accel.errors import OptionError
from accel.methods.cascade.answerer import Messages
from accel.methods.cascade.store import Found, Situation, Step

# a text → a shorter one that says the same
Shorten = Callable[[str], str]


@dataclass(frozen=True)
class Layout:
    """How demonstrations read, and where they stand (``place``).

    "system": in the system message; "user": in front of the first user's; "turns": each step as a question of the user
    and an answer of the assistant, in front of the conversation, the most similar last. Small models follow turns much
    better than descriptions, and there is nothing to be told about them: the ends are left out.

    Both ends tell a small model what to do with them, as those of the paper's predecessor (arXiv 2505.00234) do. What
    stands in front of observations, reasoning and actions should be what the agent's own messages use.
    """

    opening: str = "Here are examples of how similar tasks were solved."
    closing: str = "End of the examples. Follow them closely: answer in the same way."
    goal: str = "Task:"
    plan: str = "Plan:"
    observation: str = "Observation:"
    reasoning: str = "Reasoning:"
    action: str = "Action:"
    place: str = "system"

    def __post_init__(self) -> None:
        if self.place not in ("system", "user", "turns"):
            raise OptionError(
                f"place={self.place!r}: demonstrations stand in the system or the user message, or as turns"
            )


PLAIN = Layout()
# for tasks of one step
QUESTIONS = Layout(
    opening="Here are examples of questions and their answers.",
    closing="End of the examples. Answer the next one in the same way.",
    goal="",
    observation="Question:",
    action="Answer:",
)


def with_demonstrations(
    messages: Messages, found: Sequence[Found], layout: Layout = PLAIN, shorten: Shorten | None = None
) -> list[dict[str, str]]:
    """The messages with the demonstrations in them; as they were where there are none.

    They stand in front of a user's message, and behind what a system message already says.
    """
    out = [dict(message) for message in messages]
    if not found:
        return out
    if layout.place == "turns":
        ahead = 1 if out and out[0]["role"] == "system" else 0
        return [
            *out[:ahead],
            *(turn for each in reversed(found) for turn in _turns(each, layout, shorten)),
            *out[ahead:],
        ]
    text = rendered(found, layout, shorten)
    first = next((index for index, message in enumerate(out) if message["role"] == layout.place), None)
    if first is None:
        return [{"role": layout.place, "content": text}, *out]
    content = out[first]["content"]
    out[first]["content"] = f"{content}\n\n{text}" if layout.place == "system" else f"{text}\n\n{content}"
    return out


def rendered(found: Sequence[Found], layout: Layout = PLAIN, shorten: Shorten | None = None) -> str:
    """The demonstrations as one text, the most similar first."""
    parts = [_one(number, each, layout, shorten) for number, each in enumerate(found, 1)]
    return "\n\n".join(part for part in (layout.opening, *parts, layout.closing) if part)


def step_question(goal: str, observation: str, layout: Layout, before: Sequence[Step] = (), plan: str = "") -> str:
    """A user's message that asks for the next action: goal, steps ``before`` this one, what is seen now."""
    lines = [line(layout.goal, goal), line(layout.plan, plan)]
    for step in before:
        lines += [line(layout.observation, step.observation), line(layout.action, step.action)]
    return "\n".join(each for each in (*lines, line(layout.observation, observation), layout.action) if each)


def situation_of(messages: Messages) -> Situation:
    """Where a conversation stands, for callers that do not say: it began with a goal, and the last message is seen."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return Situation(goal=said[0] if len(said) > 1 else "", observation=said[-1] if said else "")


def _turns(found: Found, layout: Layout, shorten: Shorten | None) -> list[dict[str, str]]:
    """A question and an answer a step, worded as an agent is asked and is to answer."""
    whole = found.demonstration
    turns = []
    for step in found.steps:
        seen = shorten(step.observation) if shorten else step.observation
        said = f"{step.reasoning}\n{line(layout.action, step.action)}" if step.reasoning else step.action
        turns += [
            {"role": "user", "content": step_question(whole.goal, seen, layout, plan=whole.plan)},
            {"role": "assistant", "content": said},
        ]
    return turns


def _one(number: int, found: Found, layout: Layout, shorten: Shorten | None) -> str:
    whole, last = found.demonstration, len(found.demonstration.steps)
    lines = [f"Example {number}", line(layout.goal, whole.goal), line(layout.plan, whole.plan)]
    if (found.start, found.stop) != (0, last):
        # a student must not take the middle of something for its beginning or end
        lines.append(f"(steps {found.start + 1} to {found.stop} of {last})")
    for step in found.steps:
        lines += _step(step, layout, shorten)
    return "\n".join(line for line in lines if line)


def _step(step: Step, layout: Layout, shorten: Shorten | None) -> list[str]:
    # what is done stays as it is: it is what the student is to repeat
    seen = shorten(step.observation) if shorten else step.observation
    return [
        line(layout.observation, seen),
        line(layout.reasoning, step.reasoning),
        line(layout.action, step.action),
    ]


def line(label: str, text: str) -> str:
    return f"{label} {text}".strip() if text else ""
