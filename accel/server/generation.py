"""A request's jobs in the engine: handed in, followed, cut at stop strings, cancelled when nobody wants them any more.

Knows tokens, text and time. What an answer looks like is the endpoints' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

from accel.engine.jobs import ClosedError, Done, Event, Failed, Job, Piece, TokenLogprobs
from accel.engine.service import Service, Ticket
from accel.server.errors import ApiError
from accel.server.text import Decode, TextStream

if TYPE_CHECKING:
    from accel.server.metrics import Metrics
    from accel.types import Stats


@dataclass(frozen=True)
class Cut:
    """Where continuations end besides the engine's own ends, and what of the end is shown."""

    stops: tuple[str, ...] = ()
    include: bool = False
    min_tokens: int = 0
    # the tokens that the request itself named: such an end is told
    named_tokens: frozenset[int] = frozenset()
    # only the prompt is wanted
    silent: bool = False

    def stream(self, decode: Decode) -> TextStream:
        return TextStream(decode, self.stops, include=self.include, min_tokens=self.min_tokens)


@dataclass
class Choice:
    """One continuation so far."""

    index: int
    stream: TextStream
    cut: Cut = Cut()
    num_tokens: int = 0
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    # the stop string or the token that ended it, where the request named it
    stop_reason: str | int | None = None
    # seconds that it waited in the engine's queue
    queued: float | None = None
    # moments at which tokens came
    times: list[float] = field(default_factory=list)

    def take(self, piece: Piece) -> Update:
        """Add what the engine says; what stands behind a stop string is dropped."""
        self.times.append(perf_counter())
        self.queued = self.queued if piece.queued is None else piece.queued
        if self.cut.silent:
            self._end("length", None)
            return Update(self, "", [], 0)
        shown = len(piece.tokens)
        if piece.stop_token is not None and not self.cut.include:
            shown -= 1
        text, used = self._read(piece.tokens, shown)
        logprobs = list(piece.logprobs or ())[:used]
        self.num_tokens += used
        self.logprobs += logprobs
        if self.stream.stopped is not None:
            self._end("stop", self.stream.stopped)
        elif piece.finish is not None:
            text += self.stream.finish()
            # a stop string may have been completed by what was held back
            stopped = self.stream.stopped
            named = piece.stop_token if piece.stop_token in self.cut.named_tokens else None
            self._end("stop" if stopped else piece.finish, stopped or named)
        self.text += text
        return Update(self, text, logprobs, used)

    def abort(self) -> Update:
        """The engine is done with it and gave no reason."""
        text = self.stream.finish()
        self.text += text
        self._end("abort", None)
        return Update(self, text, [], 0)

    def _read(self, tokens: Sequence[int], shown: int) -> tuple[str, int]:
        """The text of the first ``shown`` tokens, and how many of all count."""
        if not self.stream.needs_single_tokens:
            return self.stream.feed(tokens[:shown]), len(tokens)
        text = ""
        for number in range(shown):
            text += self.stream.feed(tokens[number : number + 1])
            if self.stream.stopped is not None:
                return text, number + 1
        return text, len(tokens)

    def _end(self, finish: str, reason: str | int | None) -> None:
        self.finish, self.stop_reason = finish, reason


@dataclass(frozen=True)
class Update:
    """What a continuation gained: text that may be shown, and the tokens behind it."""

    choice: Choice
    text: str
    logprobs: list[TokenLogprobs]
    num_tokens: int


class Generation:
    """``jobs`` with the room that was reserved for each; continuation i of job j is choice ``j * n + i``."""

    def __init__(
        self,
        service: Service,
        jobs: Sequence[Job],
        tickets: Sequence[Ticket],
        decode: Decode,
        cut: Cut,
        metrics: Metrics | None = None,
        arrived: float | None = None,
    ) -> None:
        self.jobs = list(jobs)
        self.choices = [Choice(index, cut.stream(decode), cut) for index in range(sum(job.n for job in jobs))]
        self.prompt_logprobs: list[list[TokenLogprobs | None]] = [[] for _ in jobs]
        self.cached_tokens = 0
        self.stats: list[Stats] = []
        self._service = service
        self._tickets = list(tickets)
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        # job → its number in the engine, until it is over
        self._open: dict[int, int] = {}
        # pieces that came before their job's prompt was known
        self._early: dict[int, list[Piece]] = {j: [] for j, job in enumerate(jobs) if job.prompt_logprobs is not None}
        self._began = perf_counter() if arrived is None else arrived

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def start(self) -> None:
        """Hand the jobs in; what is wrong with one is raised, and the others are there until ``close``."""
        for position, (job, ticket) in enumerate(zip(self.jobs, self._tickets, strict=True)):
            self._open[position] = self._service.submit(job, self._listener(position), ticket)

    async def updates(self) -> AsyncIterator[Update]:
        """What comes, until all jobs are over; then every choice has its finish."""
        while self._open:
            position, event = await self._events.get()
            if isinstance(event, Failed):
                self._forget(position, "error")
                raise event.error
            if isinstance(event, Piece):
                for piece in self._in_order(position, event):
                    choice = self.choices[self._first(position) + piece.index]
                    if choice.finish is None:
                        update = choice.take(piece)
                        self._ended(position, choice)
                        yield update
                continue
            for update in self._over(position, event):
                yield update

    async def run(self) -> None:
        """All of it, for answers that are shown when they are whole."""
        async for _ in self.updates():
            pass

    def close(self) -> None:
        """Give back everything: jobs that still run are cancelled, room that was not used is free again."""
        for position, number in list(self._open.items()):
            # of an engine that has died nothing runs
            with suppress(ClosedError):
                self._service.cancel(number)
            self._forget(position, "abort")
        for ticket in self._tickets:
            ticket.release()

    def _listener(self, position: int) -> Listener:
        return Listener(self._loop, self._events, position)

    def _first(self, position: int) -> int:
        # the jobs of a request are alike but for their prompts
        return position * self.jobs[position].n

    def _of(self, position: int) -> list[Choice]:
        return self.choices[self._first(position) : self._first(position) + self.jobs[position].n]

    def _in_order(self, position: int, piece: Piece) -> list[Piece]:
        """Pieces that can be shown now: none before the prompt's log-probabilities, where these are asked for."""
        if position not in self._early:
            return [piece]
        if piece.prompt_logprobs is None:
            self._early[position].append(piece)
            return []
        self.prompt_logprobs[position] = piece.prompt_logprobs
        return [piece, *self._early.pop(position)]

    def _ended(self, position: int, choice: Choice) -> None:
        """What follows from a choice's end: its figures, and the end of a job that nobody waits for."""
        if choice.finish is None:
            return
        self._observe(position, choice)
        if choice.stream.stopped is not None and all(each.finish for each in self._of(position)):
            self._service.cancel(self._open[position])

    def _over(self, position: int, done: Done) -> list[Update]:
        del self._open[position]
        self.cached_tokens += done.cached_tokens
        if done.stats is not None:
            self.stats.append(done.stats)
        missing = [choice for choice in self._of(position) if choice.finish is None]
        ends = [choice.abort() for choice in missing]
        for choice in missing:
            self._observe(position, choice)
        return ends

    def _forget(self, position: int, finish: str) -> None:
        """A job from which nothing more will be read."""
        del self._open[position]
        for choice in self._of(position):
            if choice.finish is None:
                choice.finish = finish
                self._observe(position, choice)

    def _observe(self, position: int, choice: Choice) -> None:
        observe(self._metrics, choice, len(self.jobs[position].prompt), self._began)


class Listener:
    """Brings a job's events from the engine's thread to the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], position: int
    ) -> None:
        self._loop = loop
        self._events = events
        self._position = position

    def __call__(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (self._position, event))
        except RuntimeError:
            # the loop is closed, and with it everybody who could want to know
            pass


def observe(metrics: Metrics | None, choice: Choice, prompt_tokens: int, began: float) -> None:
    """Count a continuation that is over, whose request came at ``began``."""
    if metrics is None:
        return
    times = choice.times
    metrics.observe(
        prompt_tokens=prompt_tokens,
        generated_tokens=choice.num_tokens,
        finish=choice.finish or "abort",
        ttft=times[0] - began if times else None,
        inter_token=[after - before for before, after in pairwise(times)],
        e2e=perf_counter() - began,
        queue=choice.queued,
    )


def check_alive(service: Service) -> None:
    """Refuse what a dead engine would never answer."""
    if service.failure is not None:
        raise ApiError("the engine has died: the server must be started again", status=503)


def reserve(service: Service, counts: Sequence[int]) -> list[Ticket]:
    """Room for jobs of so many continuations each: all of them, or an error and none."""
    check_alive(service)
    tickets: list[Ticket] = []
    try:
        for count in counts:
            tickets.append(service.reserve(count))
    except BaseException:
        for ticket in tickets:
            ticket.release()
        raise
    return tickets
