"""Tasks that are worked on step by step, and the loop that works on them: observation, question, action.

Knows texts. Does not know who answers, or what a task is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accel.errors import OptionError
from accel.methods.cascade.prompt import PLAIN, Layout, step_question
from accel.methods.cascade.store import Demonstration, Situation, Step

# messages, and what demonstrations are found by → what is said
Ask = Callable[[list[dict[str, str]], Situation], str]
# no environment ends later, whatever it says of itself
MOST_STEPS = 1000


class Episode(Protocol):
    """One task under way. ``act`` carries out what was said, whatever it was, and changes the rest."""

    @property
    def observation(self) -> str: ...

    @property
    def done(self) -> bool: ...

    @property
    def success(self) -> bool: ...

    def act(self, action: str) -> Any: ...


class Environment(Protocol):
    """Where tasks come from; a module with these names is one.

    ``SYSTEM``: what every question begins with. A task has a ``goal``, which may be empty. The same count and seed are
    the same tasks.
    """

    SYSTEM: str

    def tasks(self, count: int, seed: int) -> Sequence[Any]: ...

    def Episode(self, task: Any) -> Episode: ...


@dataclass(frozen=True)
class Trajectory:
    """What was seen and done, and how it ended."""

    goal: str
    steps: tuple[Step, ...]
    success: bool

    def demonstration(self, *, episode: str | None = None, source: str | None = None) -> Demonstration:
        return Demonstration(self.goal, self.steps, outcome=float(self.success), episode=episode, source=source)


def question(
    system: str, goal: str, observation: str, layout: Layout = PLAIN, before: Sequence[Step] = ()
) -> list[dict[str, str]]:
    """What is asked at a step, worded as demonstrations are."""
    asked = {"role": "user", "content": step_question(goal, observation, layout, before)}
    return [{"role": "system", "content": system}, asked] if system else [asked]


def play(
    episode: Episode,
    goal: str,
    ask: Ask,
    *,
    system: str = "",
    layout: Layout = PLAIN,
    marker: str = "",
    history: int = 0,
    name: str | None = None,
) -> Trajectory:
    """Work on one task to its end.

    ``marker``: what stands in front of the action where reasoning comes first ("Action:"). ``history``: steps shown
    again in each question. ``name``: the task's own, whose demonstrations are not to be shown.
    """
    steps: list[Step] = []
    while not episode.done and len(steps) < MOST_STEPS:
        seen = episode.observation
        before = steps[-history:] if history else []
        said = ask(question(system, goal, seen, layout, before), Situation(goal=goal, observation=seen, episode=name))
        reasoning, action = parted_action(said, marker)
        steps.append(Step(seen, action, reasoning))
        episode.act(action)
    return Trajectory(goal, tuple(steps), episode.success)


def parted_action(text: str, marker: str) -> tuple[str, str]:
    """Reasoning and action, parted at the last ``marker``; all of it is the action where there is none."""
    reasoning, found, action = text.rpartition(marker) if marker else ("", "", text)
    return (reasoning.strip(), action.strip()) if found else ("", text.strip())


@dataclass(frozen=True)
class Question:
    """A task of one step: what is asked, and what is right."""

    text: str
    answer: str
    goal: str = ""


class Questions:
    """Questions with answers as an environment: each is an episode of one step."""

    def __init__(self, questions: Sequence[Question], right: Callable[[str, str], bool], system: str = "") -> None:
        self.SYSTEM = system
        self._questions = questions
        self._right = right

    def tasks(self, count: int, seed: int) -> Sequence[Question]:
        """The first ``count`` questions; they have no seed."""
        if count > len(self._questions):
            raise OptionError(f"count={count}: there are {len(self._questions)} questions")
        return self._questions[:count]

    def Episode(self, task: Question) -> Episode:
        return _OneAnswer(task, self._right)


class _OneAnswer:
    def __init__(self, task: Question, right: Callable[[str, str], bool]) -> None:
        self._task, self._right = task, right
        self.observation = task.text
        self.done = self.success = False

    def act(self, action: str) -> None:
        self.done, self.success = True, self._right(action, self._task.answer)
