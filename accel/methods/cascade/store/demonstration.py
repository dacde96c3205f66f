"""A demonstration: a trajectory that somebody went, as plain data, and a line of JSON. Knows no database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.errors import OptionError

# what retrieval looks at: two fields of the whole, two of each step
TASK_FIELDS = ("goal", "plan")
STEP_FIELDS = ("observation", "reasoning")
FIELDS = (*TASK_FIELDS, *STEP_FIELDS)
# what every number of the file and of the search can hold
MOST_OUTCOME = 1e9


@dataclass(frozen=True)
class Step:
    """What was seen, thought and done. ``short``: shorter texts to be found by, for "observation" or "reasoning"."""

    observation: str
    action: str
    reasoning: str = ""
    short: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_texts(self, ("observation", "action", "reasoning"), STEP_FIELDS)

    def found_by(self, name: str) -> str:
        """The text that stands for a field in retrieval; empty where it has none."""
        text: str = self.short.get(name) or getattr(self, name)
        return text

    def as_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "observation": self.observation,
            "reasoning": self.reasoning,
            "action": self.action,
        }
        return raw | ({"short": dict(self.short)} if self.short else {})


@dataclass(frozen=True)
class Demonstration:
    """A trajectory with its outcome (1.0 is success).

    ``episode``: the task it comes from, by whatever name tells tasks apart, so that a task is never shown itself.
    ``source``: who went it. ``short``: shorter texts to be found by, for "goal" or "plan"; what is shown stays whole.
    """

    goal: str
    steps: tuple[Step, ...]
    plan: str = ""
    outcome: float = 1.0
    episode: str | None = None
    source: str | None = None
    short: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_texts(self, ("goal", "plan"), TASK_FIELDS)
        if not self.steps or not all(isinstance(step, Step) for step in self.steps):
            raise OptionError("a demonstration needs one step or more")
        if type(self.outcome) not in (int, float) or not abs(self.outcome) <= MOST_OUTCOME:
            raise OptionError(f"outcome={str(self.outcome)[:40]}: must be a number, 1.0 for success")
        for name in ("episode", "source"):
            value = getattr(self, name)
            if value is not None and not (value and _is_text(value)):
                raise OptionError(f"{name}={str(value)[:40]!r}: must be a name, or absent")

    def found_by(self, name: str) -> str:
        """The text that stands for a field in retrieval; empty where it has none."""
        text: str = self.short.get(name) or getattr(self, name)
        return text

    def digest(self) -> bytes:
        """The same for the same trajectory and outcome, whoever went it and wherever it was met."""
        steps = [[step.observation, step.reasoning, step.action] for step in self.steps]
        text = json.dumps([self.goal, self.plan, float(self.outcome), steps])
        return hashlib.sha256(text.encode()).digest()

    def to_json(self) -> str:
        """One line."""
        raw: dict[str, Any] = {"goal": self.goal, "plan": self.plan, "outcome": self.outcome}
        raw |= {name: value for name in ("episode", "source") if (value := getattr(self, name)) is not None}
        raw |= {"short": dict(self.short)} if self.short else {}
        return json.dumps(raw | {"steps": [step.as_dict() for step in self.steps]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes, where: str = "demonstration") -> Demonstration:
        """The demonstration of a line; ``where`` opens the message when it is none."""
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where}: not a line of JSON: {' '.join(str(error).split())}") from error
        return cls.from_dict(raw, where)

    @classmethod
    def from_dict(cls, raw: Any, where: str = "demonstration") -> Demonstration:
        known = {"goal", "plan", "outcome", "episode", "source", "short", "steps"}
        _check_names(raw, known, {"goal", "steps"}, where)
        if not isinstance(raw["steps"], list):
            raise OptionError(f"{where}: steps must be a list, got {str(raw['steps'])[:40]!r}")
        try:
            steps = tuple(_step(each, f"{where}: step {index}") for index, each in enumerate(raw["steps"]))
            return cls(**{**raw, "steps": steps})
        except OptionError as error:
            raise error if str(error).startswith(where) else OptionError(f"{where}: {error}") from error


def _step(raw: Any, where: str) -> Step:
    _check_names(raw, {"observation", "reasoning", "action", "short"}, {"observation", "action"}, where)
    try:
        return Step(**raw)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _check_names(raw: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise OptionError(f"{where}: must be a JSON object, got {str(raw)[:40]!r}")
    for name in raw:
        if name not in known:
            raise OptionError(f"{where}: unknown field {name[:40]!r}, known are {', '.join(sorted(known))}")
    for name in sorted(required - raw.keys()):
        raise OptionError(f"{where}: has no {name}")


def _check_texts(made: Any, names: tuple[str, ...], may_be_short: tuple[str, ...]) -> None:
    for name in names:
        if not _is_text(getattr(made, name)):
            raise OptionError(f"{name}={str(getattr(made, name))[:40]!r}: must be a text")
    short = made.short
    if not isinstance(short, Mapping) or any(name not in may_be_short or not _is_text(short[name]) for name in short):
        raise OptionError(f"short={str(short)[:60]}: must be texts for {' or '.join(may_be_short)}")


def _is_text(value: object) -> bool:
    """A string that a file can hold: JSON can bring halves of characters, which have no UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
