"""Whoever can be asked: messages in, samples and what they took out. The one shape of students and teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from accel.errors import ModelError, OptionError
from accel.methods.cascade.prices import Price, Usage

Message = Mapping[str, str]
Messages = Sequence[Message]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. ``stop``: texts that end a sample, and are not part of it."""

    temperature: float = 0.1
    max_tokens: int = 256
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature <= 2:
            raise OptionError(f"temperature={self.temperature!r}: must be in 0..2")
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise OptionError(f"max_tokens={self.max_tokens!r}: must be a whole number ≥ 1")
        if self.top_p is not None and (type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1):
            raise OptionError(f"top_p={self.top_p!r}: must be above 0 and at most 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop={self.stop!r}: must be a tuple of texts, none of them empty")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise OptionError(f"seed={str(self.seed)[:40]!r}: must be a whole number of 64 bits, or none")


@dataclass(frozen=True)
class Sample:
    """One answer. ``finish``: "stop", or "length" where the limit cut it; the server's own word otherwise."""

    text: str
    finish: str = "stop"


@dataclass(frozen=True)
class Reply:
    """What was answered, and what it took. ``usage`` None: the model did not say; ``model``: who it says it is."""

    samples: tuple[Sample, ...]
    usage: Usage | None
    seconds: float
    model: str


class Unanswered(ModelError):
    """A model that was asked and did not answer. ``usage``: what it reported all the same, None where it did not."""

    def __init__(self, message: str, *, seconds: float, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.usage = usage


class Answerer(Protocol):
    """A student or a teacher.

    ``shares_prompt``: several samples of one call cost one reading of the prompt. ``price`` None: unknown.
    """

    name: str
    price: Price | None

    @property
    def shares_prompt(self) -> bool: ...

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        """n answers to the messages, at the latest after ``seconds``; raises ``Unanswered``."""


def check_messages(messages: Messages) -> None:
    """Refuse what is no conversation that can be answered."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise OptionError('messages must be a list of {"role", "content"}, at least one')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise OptionError(f"messages[{number}]: must have a role and a text as content")
        if message.get("role") not in ROLES:
            raise OptionError(f"messages[{number}]: role is {message.get('role')!r}, known are {', '.join(ROLES)}")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"messages[{number}]: holds half a character, which has no UTF-8") from error


def check_question(messages: Messages, n: int, seconds: float) -> None:
    """Refuse what no answerer could answer."""
    check_messages(messages)
    if type(n) is not int or n < 1:
        raise OptionError(f"n={n!r}: samples to draw, a whole number ≥ 1")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise OptionError(f"seconds={seconds!r}: the time limit must be a number > 0")
