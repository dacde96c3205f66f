"""The cascade (arXiv 2512.02543): the student several times, and the teacher for this step alone where they disagree.

Knows answerers, votes and ledgers. Does not know what an answerer is made of, or what the answers are for.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from accel.errors import ModelError, first_line
from accel.methods.cascade import background
from accel.methods.cascade.accounting import STUDENT, TEACHER, Attempt, Ledger, Totals
from accel.methods.cascade.agreement import Key, Same, Tally, Verdict
from accel.methods.cascade.answerer import Answerer, Messages, Reply, Sampling, Unanswered, check_messages
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prices import HourPrice, Usage
from accel.methods.cascade.prompt import PLAIN, Layout, Shorten, situation_of, step_question, with_demonstrations
from accel.methods.cascade.store import Demonstration, DemonstrationStore, Found, Situation, Step
from accel.methods.cascade.tasks import parted_action

Result = TypeVar("Result")
Valid = Callable[[str], bool]

AGREED, ESCALATED, FALLBACK = "agreed", "escalated", "fallback"
UNREADABLE = "an answer that is empty, or that the comparison cannot read"


@dataclass(frozen=True)
class Answer:
    """What a cascade says, who said it, why, and what it cost.

    ``decision``: "agreed" (the student's samples did), "escalated" (the teacher's answer), or "fallback" (the teacher
    was wanted and did not answer: the student's best). ``notes``: what else should be known, a sentence each.
    ``finish``: "length" where the text was cut off at ``max_tokens`` (see ``Sample``).
    """

    text: str
    decision: str
    verdict: Verdict
    ledger: Ledger
    found: tuple[Found, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    finish: str = "stop"

    @property
    def model(self) -> str | None:
        """The model that really answered."""
        return self.ledger.answered_by

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "text": self.text,
            "finish": self.finish,
            "decision": self.decision,
            **self.ledger.as_dict(),
            "votes": self.verdict.votes,
            "samples": self.verdict.taken,
            "planned_samples": self.verdict.planned,
            "demonstrations": len(self.found),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Piece:
    """Some of an answer's text, in order; the last one carries the ``answer``, whose text all of them make."""

    text: str
    answer: Answer | None = None


class NoAnswer(ModelError):
    """Nobody answered; ``ledger`` has what was charged all the same."""

    def __init__(self, message: str, ledger: Ledger) -> None:
        super().__init__(message)
        self.ledger = ledger


@dataclass
class _Sums:
    """What requests leave behind."""

    totals: Totals = field(default_factory=Totals)
    # seconds of the teacher's answers so far, and how many: what one would have taken
    teacher_seconds: float = 0.0
    teacher_answers: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Cascade:
    """Routes requests between a student and a teacher; any number of threads may ask at once.

    Without a teacher, samples that do not agree give the student's best answer. ``key`` or ``same`` compare answers in
    the place of ``options.compare`` (see ``agreement.Rule``). ``layout`` and ``system``: how demonstrations were asked
    for, which ``ask`` follows. ``totals`` are the sums over all requests.
    """

    def __init__(
        self,
        student: Answerer,
        teacher: Answerer | None,
        options: CascadeOptions | None = None,
        *,
        store: DemonstrationStore | None = None,
        key: Key | None = None,
        same: Same | None = None,
        layout: Layout = PLAIN,
        system: str = "",
        shorten: Shorten | None = None,
    ) -> None:
        self.student, self.teacher, self.store = student, teacher, store
        self.system = system
        self.options = options or CascadeOptions()
        self.rule = self.options.rule(key, same)
        self.layout, self.shorten = layout, shorten
        self._key, self._same = key, same
        self._sums = _Sums()

    @property
    def totals(self) -> Totals:
        return self._sums.totals

    def varied(self, student: Answerer, teacher: Answerer | None, options: CascadeOptions) -> Cascade:
        """The same cascade for one request that is answered otherwise: its sums are those of all."""
        other = copy.copy(self)
        other.student, other.teacher, other.options = student, teacher, options
        other.rule = options.rule(self._key, self._same)
        return other

    def answer(self, messages: Messages, situation: Situation | None = None, valid: Valid | None = None) -> Answer:
        """Answer the last message, at the latest after both time limits; raises ``NoAnswer``.

        ``situation``: what demonstrations are found by; read from the messages where it is not given. ``valid``: says
        of a text whether it is an answer here at all (an action that can be done); samples that are none agree with
        nothing.
        """
        check_messages(messages)
        return _Request(self, messages, situation or situation_of(messages), valid).answer()

    def ask(self, text: str) -> Answer:
        """Answer a question of one message, which is worded as the demonstrations are where there are any."""
        if self.store is None:
            return self.answer([{"role": "user", "content": text}])
        asked = [{"role": "user", "content": step_question("", text, self.layout)}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.answer([*system, *asked], Situation(observation=text))

    def stream(
        self, messages: Messages, situation: Situation | None = None, valid: Valid | None = None
    ) -> Iterator[Piece]:
        """``answer`` in pieces: the text as soon as it is decided, and the account behind it.

        Nothing is asked before the first piece is. A teacher's text is not handed out while it is written: it may fail,
        or turn out to be one that cannot be read, and then the student's best is the answer.
        """
        check_messages(messages)
        return self._pieces(messages, situation, valid)

    def _pieces(self, messages: Messages, situation: Situation | None, valid: Valid | None) -> Iterator[Piece]:
        answer = self.answer(messages, situation, valid)
        yield Piece(answer.text)
        yield Piece("", answer)

    def _account(self, ledger: Ledger) -> None:
        answered = [a for a in ledger.attempts if a.role == TEACHER and a.error is None]
        sums = self._sums
        with sums.lock:
            sums.totals.add(ledger)
            sums.teacher_seconds += sum(attempt.seconds for attempt in answered)
            sums.teacher_answers += len(answered)

    def _usual_teacher_seconds(self) -> float | None:
        sums = self._sums
        with sums.lock:
            return sums.teacher_seconds / sums.teacher_answers if sums.teacher_answers else None


class _Request:
    """One question on its way."""

    def __init__(self, cascade: Cascade, messages: Messages, situation: Situation, valid: Valid | None) -> None:
        self.cascade, self.options = cascade, cascade.options
        self.messages, self.situation, self.valid = messages, situation, valid
        self.began = time.monotonic()
        self.attempts: list[Attempt] = []
        self.notes: list[str] = []
        # how each of the student's samples ended
        self.finishes: list[str] = []
        self.found, self.shown = self._demonstrated()

    def answer(self) -> Answer:
        tally = self._ask_student()
        verdict, best = tally.verdict(), tally.best()
        if best is not None and verdict.text is not None:
            return self._finish(verdict.text, AGREED, verdict, self._student_model(), self.finishes[best.members[0]])
        why = self._why_not(verdict)
        if self.cascade.teacher is not None:
            taught = self._ask_teacher(self.cascade.teacher)
            if isinstance(taught, Reply):
                self.attempts = [replace(each, rejected=each.role == STUDENT) for each in self.attempts]
                self._learn(taught)
                said = taught.samples[0]
                return self._finish(said.text, ESCALATED, verdict, taught.model, said.finish)
            why = f"{why}; {taught}"
        wanted_teacher = self.cascade.teacher is not None and self.options.without_teacher == "error"
        if best is None or wanted_teacher:
            self.attempts = [replace(each, rejected=True) for each in self.attempts]
            ledger = self._ledger(None, verdict)
            raise NoAnswer(why, ledger)
        self.notes.append(why)
        return self._finish(best.text, FALLBACK, verdict, self._student_model(), self.finishes[best.members[0]])

    def _demonstrated(self) -> tuple[tuple[Found, ...], Messages]:
        """What the store finds, and the messages with it; half of the student's time may go into that."""
        cascade, k = self.cascade, self.options.demonstrations
        store = cascade.store
        if store is None or k == 0:
            return (), self.messages

        def look() -> tuple[tuple[Found, ...], Messages]:
            found = tuple(store.retrieve(self.situation, k, window=self.options.window))
            return found, with_demonstrations(self.messages, found, cascade.layout, cascade.shorten)

        # a question is worth answering without examples too
        return self._tried("without demonstrations", look, self.options.student_seconds / 2) or ((), self.messages)

    def _tried(self, without: str, call: Callable[[], Result], seconds: float) -> Result | None:
        """What an answer can do without, whatever a store, an embedder or a user's function raises, or takes."""
        try:
            return background.within(call, seconds)
        except TimeoutError:
            self.notes.append(f"{without}: not done within {seconds:.3g} s")
        except Exception as error:
            self.notes.append(f"{without}: {first_line(error)}")
        return None

    def _ask_student(self) -> Tally:
        """Samples until they are decided, or there are no more, or the time is over."""
        student, options = self.cascade.student, self.options
        in_rounds = options.early_exit == "always" or (options.early_exit == "auto" and not student.shares_prompt)
        tally = self.cascade.rule.tally()
        last = self.began + options.student_seconds
        while not tally.decided():
            n = tally.fewest() if in_rounds else options.samples - tally.taken
            settings = options.student_sampling(tally.taken)
            reply = self._ask(student, STUDENT, self.shown, n, settings, last - time.monotonic())
            if not isinstance(reply, Reply):
                self.notes.append(reply)
                break
            for sample in reply.samples[:n]:
                tally.add(sample.text, valid=self.valid is None or self.valid(sample.text))
                self.finishes.append(sample.finish)
        return tally

    def _ask_teacher(self, teacher: Answerer) -> Reply | str:
        """The teacher's answer to the question as it came, or why there is none that can be used."""
        reply = self._ask(
            teacher, TEACHER, self.messages, 1, self.options.teacher_sampling(), self.options.teacher_seconds
        )
        if isinstance(reply, Reply) and self.cascade.rule.key(reply.samples[0].text) is None:
            self.attempts[-1] = replace(self.attempts[-1], rejected=True, error=UNREADABLE)
            return f"{teacher.name}: {UNREADABLE}"
        return reply

    def _ask(
        self, who: Answerer, role: str, messages: Messages, n: int, settings: Sampling, seconds: float
    ) -> Reply | str:
        """A reply with at least one sample, or why there is none; either is on the account."""
        if seconds <= 0:
            return f"{who.name}: no time left"
        try:
            reply = who.sample(messages, n, settings, seconds=seconds)
        except Unanswered as error:
            failed = Attempt(who.name, role, error.usage, error.seconds, who.price, n, rejected=True, error=str(error))
            self.attempts.append(failed)
            return str(error)
        made = Attempt(reply.model, role, reply.usage, reply.seconds, who.price, len(reply.samples))
        self.attempts.append(made)
        if reply.samples:
            return reply
        self.attempts[-1] = replace(made, rejected=True, error="no samples")
        return f"{who.name}: no samples"

    def _why_not(self, verdict: Verdict) -> str:
        failed = self.attempts[-1].error if self.attempts else None
        if failed is not None:
            return failed
        needed = f"{self.cascade.rule.needed} of {verdict.planned} must"
        return f"{verdict.votes} of {verdict.taken} samples of {self.cascade.student.name} agree, {needed}"

    def _student_model(self) -> str:
        answered = [each.model for each in self.attempts if each.role == STUDENT and each.error is None]
        return answered[0]

    def _finish(self, text: str, decision: str, verdict: Verdict, model: str, finish: str) -> Answer:
        ledger = self._ledger(model, verdict)
        seconds = time.monotonic() - self.began
        return Answer(text, decision, verdict, ledger, self.found, seconds, tuple(self.notes), finish)

    def _ledger(self, model: str | None, verdict: Verdict) -> Ledger:
        ledger = Ledger(tuple(self.attempts), model, verdict.agreement, self._teacher_estimate())
        self.cascade._account(ledger)
        return ledger

    def _teacher_estimate(self) -> float | None:
        """$ that the teacher would have taken: the question's share of what the student read, and one answer's length.

        By the hour: as long as its answers took so far.
        """
        teacher = self.cascade.teacher
        price = None if teacher is None else teacher.price
        if price is None:
            return None
        if isinstance(price, HourPrice):
            usual = self.cascade._usual_teacher_seconds()
            return None if usual is None else price.dollars(None, usual)
        answered = [a for a in self.attempts if a.role == STUDENT and a.usage is not None and a.samples and not a.error]
        if not answered or answered[0].usage is None:
            return None
        usage, samples = answered[0].usage, answered[0].samples
        readings = 1 if self.cascade.student.shares_prompt else samples
        share = _length(self.messages) / max(1, _length(self.shown)) / readings
        return price.dollars(Usage(round(usage.input_tokens * share), 0, round(usage.output_tokens / samples)), 0.0)

    def _learn(self, taught: Reply) -> None:
        """Keep what the teacher did here as a demonstration of one step, which is taken for a success."""
        store, said = self.cascade.store, taught.samples[0]
        if not self.options.learn or store is None:
            return
        if said.finish == "length":
            self.notes.append(f"not learned: the answer was cut off at {self.options.max_tokens} tokens")
            return
        if self.valid is not None and not self.valid(said.text):
            self.notes.append("not learned: it is no answer here")
            return
        reasoning, action = parted_action(said.text, self.options.action_marker)
        here, source = self.situation, f"teacher:{taught.model}"

        def keep() -> None:
            step = Step(here.observation, action, reasoning)
            store.add([Demonstration(here.goal, (step,), plan=here.plan, episode=here.episode, source=source)])

        # it is written all the same when a busy file lets it; the answer does not wait for that
        self._tried("not learned", keep, max(0.1, self.options.teacher_seconds - taught.seconds))


def _length(messages: Messages | Sequence[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)
