"""What a user chooses about a cascade, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from accel.errors import OptionError
from accel.methods.cascade.agreement import Rule, Same, after, comparison
from accel.methods.cascade.answerer import Sampling


@dataclass(frozen=True)
class CascadeOptions:
    """The defaults are the paper's (arXiv 2512.02543) for ALFWorld: three samples at 0.1 that must all be the same."""

    samples: int = field(default=3, metadata={"help": "answers that are asked of the student"})
    threshold: float = field(default=1.0, metadata={"help": "share of them that must agree; 1.0 is all"})
    compare: str = field(default="exact", metadata={"help": "how: exact, normalised, json or code"})
    action_marker: str = field(default="", metadata={"help": "compare only what follows this text ('Action:')"})
    early_exit: str = field(
        default="auto",
        metadata={"help": "ask only for as many as can decide, then for more: always, never, auto (where each costs)"},
    )
    demonstrations: int = field(default=6, metadata={"help": "demonstrations shown to the student; 0 for none"})
    window: int = field(default=5, metadata={"help": "steps shown of each"})
    temperature: float = field(default=0.1, metadata={"help": "the student's"})
    teacher_temperature: float = field(default=0.0, metadata={"help": "the teacher's"})
    max_tokens: int = field(default=256, metadata={"help": "most tokens of an answer"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "texts that end an answer"})
    seed: int | None = field(default=None, metadata={"help": "the same samples again, where a model can"})
    student_seconds: float = field(default=60.0, metadata={"help": "time for all the student's samples"})
    teacher_seconds: float = field(default=120.0, metadata={"help": "time for the teacher's answer"})
    without_teacher: str = field(
        default="student", metadata={"help": "where it fails: the student's best answer (student), or an error (error)"}
    )
    learn: bool = field(default=False, metadata={"help": "keep the teacher's answers as demonstrations"})

    def __post_init__(self) -> None:
        # they say themselves what is wrong with their part; the student's seed is a sum, so that it comes second
        self.rule()
        self.teacher_sampling()
        self.student_sampling(0)
        if self.samples > 1 and self.temperature == 0:
            raise OptionError(
                f"temperature=0 with samples={self.samples}: they would be the same whatever the student knows; take a "
                "temperature above 0, or one sample"
            )
        _check("early_exit", self.early_exit, ("always", "auto", "never"))
        _check("without_teacher", self.without_teacher, ("error", "student"))
        for name, least in (("demonstrations", 0), ("window", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"{name}={value!r}: must be a whole number ≥ {least}")
        for name in ("student_seconds", "teacher_seconds"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name}={value!r}: a time limit is a number of seconds > 0")

    def rule(self, key: Callable[[str], Hashable | None] | None = None, same: Same | None = None) -> Rule:
        """When samples agree; ``key`` and ``same`` are a user's own in the place of ``compare``."""
        chosen = comparison(self.compare) if key is None else key
        if self.action_marker:
            chosen = after(self.action_marker, chosen)
        return Rule(self.samples, self.threshold, chosen, same)

    def student_sampling(self, taken: int) -> Sampling:
        """``taken``: samples drawn before, whose seeds are used up."""
        seed = None if self.seed is None else self.seed + taken
        return Sampling(self.temperature, self.max_tokens, None, self.stop, seed)

    def teacher_sampling(self) -> Sampling:
        return Sampling(self.teacher_temperature, self.max_tokens, None, self.stop, self.seed)


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: choose from {', '.join(allowed)}")
