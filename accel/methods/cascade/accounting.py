"""What a request really cost: every attempt at its own model's price, and what the teacher alone would have cost.

Knows attempts and sums. Does not know who decides, or how anybody is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from accel.errors import OptionError
from accel.methods.cascade.prices import Price, Usage

STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Attempt:
    """One model asked once, for one sample or several. A rejected one is charged like any other.

    ``price`` None: nobody said what the model costs; ``usage`` None: the model did not say what it read and wrote. The
    request's cost is then unknown too, and not zero.
    ``error``: why there is no answer; its tokens are those that the model reported before it failed.
    """

    model: str
    role: str
    usage: Usage | None
    seconds: float
    price: Price | None
    samples: int = 1
    rejected: bool = False
    error: str | None = None

    def __post_init__(self) -> None:
        if self.role not in (STUDENT, TEACHER):
            raise OptionError(f"role={self.role!r}: an attempt is the {STUDENT}'s or the {TEACHER}'s")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise OptionError(f"seconds={self.seconds}: must be a number ≥ 0")

    @property
    def cost(self) -> float | None:
        """$, or None where the price is unknown."""
        return None if self.price is None else self.price.dollars(self.usage, self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": self.model,
            "role": self.role,
            "samples": self.samples,
            "rejected": self.rejected,
            "error": self.error,
            "seconds": self.seconds,
            **({} if self.usage is None else vars(self.usage)),
            "price": None if self.price is None else self.price.as_dict(),
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Ledger:
    """The account of one request.

    ``answered_by``: the model whose text was returned; None where nobody's was. ``agreement``: the share of the
    student's samples that said the same. ``teacher_estimate``: what the teacher was expected to take for this request,
    for requests that it was not asked ("saved" is an estimate there, and says so).
    """

    attempts: tuple[Attempt, ...]
    answered_by: str | None
    agreement: float | None = None
    teacher_estimate: float | None = None

    @property
    def cost(self) -> float | None:
        """$ of all attempts, rejected drafts and failures included."""
        return _sum(attempt.cost for attempt in self.attempts)

    @property
    def usage(self) -> Usage:
        """Tokens of all attempts that told theirs."""
        return sum((attempt.usage for attempt in self.attempts if attempt.usage is not None), Usage())

    @property
    def teacher_only(self) -> float | None:
        """$ without a student: what the teacher took for this request, or is expected to have taken."""
        asked = self._teacher_answered()
        return _sum(attempt.cost for attempt in asked) if asked else self.teacher_estimate

    @property
    def estimated(self) -> bool:
        """Whether ``teacher_only`` is an expectation and not a bill."""
        return not self._teacher_answered() and self.teacher_estimate is not None

    @property
    def saved(self) -> float | None:
        """$ less than the teacher alone; negative where the student's drafts were for nothing."""
        cost, alone = self.cost, self.teacher_only
        return None if cost is None or alone is None else alone - cost

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: what a response carries beside its text."""
        return {
            "model": self.answered_by,
            "agreement": self.agreement,
            "cost": self.cost,
            "teacher_only": self.teacher_only,
            "saved": self.saved,
            "estimated": self.estimated,
            **vars(self.usage),
            "attempts": [attempt.as_dict() for attempt in self.attempts],
        }

    def _teacher_answered(self) -> list[Attempt]:
        """The teacher's attempts where one of them came to an answer: alone it would have failed as often before."""
        asked = [attempt for attempt in self.attempts if attempt.role == TEACHER]
        return asked if any(attempt.error is None for attempt in asked) else []


@dataclass
class Totals:
    """Sums over requests. A sum is None as soon as one request's part is unknown: a partial sum would look cheaper."""

    requests: int = 0
    answered_by: dict[str, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    escalated: int = 0
    cost: float | None = 0.0
    teacher_only: float | None = 0.0

    def add(self, ledger: Ledger) -> None:
        self.requests += 1
        if ledger.answered_by is not None:
            self.answered_by[ledger.answered_by] = self.answered_by.get(ledger.answered_by, 0) + 1
        self.usage += ledger.usage
        self.escalated += any(attempt.role == TEACHER for attempt in ledger.attempts)
        self.cost = _sum((self.cost, ledger.cost))
        self.teacher_only = _sum((self.teacher_only, ledger.teacher_only))

    @property
    def saved(self) -> float | None:
        return None if self.cost is None or self.teacher_only is None else self.teacher_only - self.cost

    @property
    def relative_cost(self) -> float | None:
        """Cost over that of the teacher alone."""
        return self.cost / self.teacher_only if self.cost is not None and self.teacher_only else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "escalated": self.escalated,
            "answered_by": dict(self.answered_by),
            **vars(self.usage),
            "cost": self.cost,
            "teacher_only": self.teacher_only,
            "saved": self.saved,
            "relative_cost": self.relative_cost,
        }


def break_even(demonstrations: int, teacher_cost: float, cascade_cost: float) -> float:
    """Episodes after which the demonstrations are paid for (arXiv 2512.02543): N_demo · C_T / (C_T − C_casc).

    ``teacher_cost`` and ``cascade_cost``: $ an episode. ``inf`` where the cascade saves nothing. It prices the
    collection at the teacher's full cost and gives no credit for the answers that were collected on the way.
    """
    if demonstrations < 0 or min(teacher_cost, cascade_cost) < 0:
        raise OptionError(
            f"break_even({demonstrations}, {teacher_cost}, {cascade_cost}): numbers of episodes and dollars are ≥ 0"
        )
    if demonstrations == 0:
        return 0.0
    saved = teacher_cost - cascade_cost
    return demonstrations * teacher_cost / saved if saved > 0 else math.inf


def _sum(parts: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown."""
    known = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    return math.fsum(known)
