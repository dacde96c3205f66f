"""A service without a model: each continuation is a list of tokens that a test wrote, handed out at a given pace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.engine.jobs import ClosedError, Done, Event, Failed, Gauges, Job, Piece, QueueFullError, TokenLogprobs
from accel.engine.service import Service, Ticket
from accel.types import Stats

# the tokens of continuation ``index`` of a job; or what goes wrong with the job
Script = Callable[[Job, int], Sequence[int]]


class Room(Ticket):
    def __init__(self, service: ScriptedService, count: int) -> None:
        self._service = service
        self._count = count
        self.used = False

    def release(self) -> None:
        if not self.used:
            self._service.free(self._count)
            self.used = True


@dataclass
class Running:
    job: Job
    on_event: Callable[[Event], None]
    count: int
    texts: list[list[int]]
    told: list[int] = field(default_factory=list)
    over: set[int] = field(default_factory=set)
    cancelled: bool = False


class ScriptedService(Service):
    """``chunk`` tokens of every continuation a step, ``pace`` seconds between steps.

    ``fail_after``: steps of a job after which it fails with ``error``.
    """

    def __init__(
        self,
        script: Script,
        *,
        chunk: int = 1,
        pace: float = 0.0,
        max_queue: int = 64,
        fail_after: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self.script = script
        self.chunk = chunk
        self.pace = pace
        self.max_queue = max_queue
        self.fail_after = fail_after
        self.error = error if error is not None else RuntimeError("it broke in /some/where/model.bin")
        self.dead: BaseException | None = None
        self.closed = False
        self.jobs: list[Job] = []
        self.cancelled: list[int] = []
        self.steps = 0
        self.reserved = 0
        self.embedded: list[list[int]] = []
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reserve(self, count: int = 1) -> Ticket:
        with self._changed:
            if self.closed:
                raise ClosedError("the server is shutting down")
            if self.reserved + count > self.max_queue:
                raise QueueFullError(f"{self.reserved} continuations are waiting: try again later", retry_after=3)
            self.reserved += count
        return Room(self, count)

    def free(self, count: int) -> None:
        with self._changed:
            self.reserved -= count
            self._changed.notify_all()

    def submit(self, job: Job, on_event: Callable[[Event], None], ticket: Ticket | None = None) -> int:
        texts = [self._written(job, index) for index in range(job.n)]
        assert isinstance(ticket, Room) and not ticket.used
        ticket.used = True
        with self._changed:
            self.jobs.append(job)
            number = len(self.jobs)
            self._running[number] = Running(job, on_event, job.n, texts, [0] * job.n)
            self._changed.notify_all()
        return number

    def cancel(self, number: int) -> None:
        with self._changed:
            if number in self._running:
                self.cancelled.append(number)
                self._running[number].cancelled = True
                self._changed.notify_all()

    def embed(self, prompts: Sequence[Sequence[int]], on_done: Callable[[Any], None]) -> None:
        self.embedded += map(list, prompts)
        vectors = [[0.6, 0.8 * (-1) ** len(prompt)] for prompt in prompts]
        threading.Thread(target=on_done, args=(vectors,), daemon=True).start()

    def gauges(self) -> Gauges:
        return Gauges(running=len(self._running))

    @property
    def failure(self) -> BaseException | None:
        return self.dead

    def close(self, drain: float = 0.0) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def wait_idle(self, seconds: float = 5.0) -> bool:
        """Whether all jobs were over, and all room was free, in that time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and not self.reserved, seconds)

    @staticmethod
    def _cut(job: Job, tokens: Sequence[int]) -> list[int]:
        kept = list(tokens)[: job.max_new_tokens]
        ends = [place for place, token in enumerate(kept) if token in job.stop_tokens]
        return kept[: ends[0] + 1] if ends else kept

    def _written(self, job: Job, index: int) -> list[int]:
        return self._cut(job, self.script(job, index))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self.closed)
                if self.closed:
                    return
                batch = list(self._running.items())
            for number, running in batch:
                self._step(number, running)
            with self._changed:
                self.steps += 1
                if self.pace:
                    self._changed.wait(self.pace)

    def _step(self, number: int, running: Running) -> None:
        steps = max(running.told) // self.chunk
        if self.fail_after is not None and steps >= self.fail_after:
            self._end(number, running, Failed(self.error))
            return
        for index in range(running.count):
            if index not in running.over:
                running.on_event(self._piece(running, index))
        if len(running.over) == running.count:
            drafted = sum(map(len, running.texts))
            stats = Stats(method="speculative", drafted_tokens=drafted, accepted_tokens=drafted // 2, row_calls=drafted)
            self._end(number, running, Done(cached_tokens=min(1, len(running.job.prompt)), stats=stats))

    def _end(self, number: int, running: Running, event: Event) -> None:
        with self._changed:
            del self._running[number]
            self.reserved -= running.count
            self._changed.notify_all()
        running.on_event(event)

    def _piece(self, running: Running, index: int) -> Piece:
        job, text = running.job, running.texts[index]
        begin = running.told[index]
        end = begin if running.cancelled else min(len(text), begin + self.chunk)
        running.told[index] = end
        tokens = text[begin:end]
        is_last = running.cancelled or end == len(text)
        stop_token = tokens[-1] if is_last and tokens and tokens[-1] in job.stop_tokens else None
        finish: Any = None
        if is_last:
            running.over.add(index)
            finish = "abort" if running.cancelled else "stop" if stop_token is not None else "length"
        of_prompt = None
        if job.prompt_logprobs is not None and index == 0 and begin == 0:
            of_prompt = [None, *(logprobs_of(token, job.prompt_logprobs) for token in job.prompt[1:])]
        wanted = None if job.logprobs is None else [logprobs_of(token, job.logprobs) for token in tokens]
        return Piece(index, tokens, wanted, finish, stop_token, of_prompt)


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    """The token is the most likely one, and those with the ids behind it follow."""
    return TokenLogprobs(token, -0.5, 1, tuple((token + place, -0.5 - place) for place in range(count)))
