"""Continuous batching for many callers: a thread that owns the model, and a bounded queue in front of it.

Callers hand in jobs from any thread and are called back from the engine's. Knows nothing of HTTP, text or asyncio.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.engine.attached import STATE, Attached
from accel.engine.batcher import Batcher, Work
from accel.engine.jobs import ClosedError, Event, Failed, Gauges, Job, QueueFullError
from accel.errors import AccelError, OptionError
from accel.kernels.native import release_workers
from accel.types import Stats

log = logging.getLogger("accel")


class Ticket:
    """Room in the queue; ``release()`` gives it back unless a job was submitted with it."""

    def __init__(self, service: Service, count: int) -> None:
        self._service, self.count = service, count

    def release(self) -> None:
        self._service._give_back(self)


class Service:
    """Runs jobs through one attached model, many at a time; every method may be called from any thread.

    At most ``max_rows`` continuations are decoded together and ``max_queue`` more wait, first come, first served. No
    step reads more than ``piece`` tokens of new prompts. ``prefix_bytes`` bounds what is kept of contexts for prompts
    that begin alike, ``context_bytes`` the rows themselves (default: half of the memory that is free).
    """

    def __init__(
        self,
        attached: Attached,
        *,
        max_rows: int = 16,
        max_queue: int = 64,
        piece: int = 256,
        prefix_bytes: int = 512 << 20,
        context_bytes: int | None = None,
    ) -> None:
        for name, value, least in (("max_rows", max_rows, 1), ("max_queue", max_queue, 0), ("piece", piece, 1)):
            if value < least:
                raise OptionError(f"{name}={value}: must be {least} or more")
        self.attached = attached
        self.max_rows, self.max_queue = max_rows, max_queue
        self._batcher = Batcher(
            attached,
            max_rows=max_rows,
            piece=piece,
            prefix_bytes=prefix_bytes,
            context_bytes=context_bytes,
            on_gone=self._gone,
        )
        # what other threads want done, in order
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        # continuations that are running, waiting or have room reserved
        self._taken = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._seconds_per_job = 1.0
        self._occupancy = attached.served()
        self._occupancy.__enter__()
        # from here on the model is the engine's thread's
        release_workers()
        self._thread = threading.Thread(target=self._run, name="accel-engine", daemon=True)
        self._thread.start()

    @property
    def vocab_size(self) -> int:
        return self._batcher.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Positions that prompt and answer may take together; None where nothing runs out."""
        return self._batcher.max_positions

    # for callers

    def reserve(self, count: int = 1) -> Ticket:
        """Room for ``count`` continuations, before anything is spent on them."""
        most = self.max_rows + self.max_queue
        with self._wake:
            self._check_open()
            if count > most:
                raise OptionError(f"{count} continuations asked for at once: this service has room for {most}")
            if self._taken + count > most:
                after = math.ceil(self._seconds_per_job * (self._taken + count - most) / self.max_rows)
                raise QueueFullError(
                    f"the queue is full: {self._taken} continuations are running or waiting, {most} fit; try again",
                    retry_after=min(max(after, 1), 60),
                )
            self._taken += count
        return Ticket(self, count)

    def submit(self, job: Job, on_event: Callable[[Event], None], ticket: Ticket | None = None) -> int:
        """Queue a job; returns its number. What is wrong with it is raised here.

        ``on_event`` is called on the engine's thread and must return at once.
        """
        ticket = ticket or self.reserve(job.n)
        try:
            if ticket.count != job.n:
                raise OptionError(f"a ticket for {ticket.count} continuations and a job of {job.n}")
            work = self._batcher.work(job, on_event)
        except BaseException:
            ticket.release()
            raise
        with self._wake:
            ticket.count = 0
            if self._closing or self._failure is not None:
                self._taken -= job.n
                self._check_open()
            self._inbox.append(lambda: self._batcher.add(work))
            self._wake.notify()
        return work.number

    def cancel(self, number: int) -> None:
        """Abort a job within one step: its continuations finish with "abort", then comes Done. Late calls are fine."""
        with suppress(ClosedError):
            self._tell(lambda: self._batcher.abort(number))

    def embed(self, prompts: Sequence[Sequence[int]], on_done: Callable[[list[list[float]] | Exception], None]) -> None:
        """Last hidden state of each prompt's last token, scaled to length 1; ``on_done`` is called once."""
        for prompt in prompts:
            self._batcher.check(prompt, 1)
        found: list[list[float]] = []

        def one(index: int) -> None:
            # a command a prompt, so that rows go on between them
            try:
                found.append(self._batcher.embedding(prompts[index]))
            except Exception as error:
                on_done(error)
                return
            if len(found) == len(prompts):
                on_done(found)
            else:
                self._inbox.append(lambda: one(index + 1))

        self._tell(lambda: one(0))

    def gauges(self) -> Gauges:
        """What is there now, and what has been counted so far."""
        lanes = list(self._batcher.lanes.values())
        running = sum(len(lane.rows) for lane in lanes)
        counted = Stats()
        for each in (self._batcher.past, *(lane.stats for lane in lanes)):
            counted.add_drafts(each)
        return Gauges(
            running=running,
            waiting=max(0, self._taken - running),
            context_bytes={**self._batcher.bytes, "cartridges": self.attached.cartridges.store.nbytes()},
            cartridges=tuple(self.attached.cartridges.store.names()),
            drafts=sum(counted.drafted_by_position[:1]),
            drafted_tokens=counted.drafted_tokens,
            accepted_tokens=counted.accepted_tokens,
            accepted_by_position=tuple(counted.accepted_by_position),
            **self._batcher.sums,
        )

    @property
    def failure(self) -> BaseException | None:
        """What the engine died of; None while it lives."""
        return self._failure

    def close(self, drain: float = 0.0) -> None:
        """Take no more jobs, give those under way ``drain`` seconds, abort the rest, end the thread."""
        until = time.monotonic() + drain
        with self._wake:
            self._closing = True
            self._wake.notify()
        while self._taken and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.02)
        self._tell(self._batcher.abort_all, even_if_closed=True)
        self._thread.join()

    # on callers' threads
    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError("the engine has failed: restart the server")
        if self._closing:
            raise ClosedError("the server is shutting down")

    def _give_back(self, ticket: Ticket) -> None:
        with self._wake:
            self._taken -= ticket.count
            ticket.count = 0

    def _tell(self, command: Callable[[], None], *, even_if_closed: bool = False) -> None:
        with self._wake:
            if not even_if_closed and self._failure is not None:
                self._check_open()
            self._inbox.append(command)
            self._wake.notify()

    def _gone(self, work: Work) -> None:
        with self._wake:
            self._taken -= work.job.n
        self._seconds_per_job += 0.1 * (work.ended - work.since - self._seconds_per_job)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:
            log.exception("the engine has failed")
            with self._wake:
                self._failure = error
            for work in list(self._batcher.works.values()):
                self._batcher.lose(work, Failed(ClosedError("the engine has failed")))
        finally:
            self._batcher.prefixes.clear()
            self._occupancy.__exit__(None, None, None)

    def _turn(self) -> bool:
        """One round of everything; False when the service is closed and nothing is left to do."""
        with self._wake:
            while not self._inbox and not self._batcher.works:
                if self._closing:
                    return False
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()
        self._batcher.turn()
        return True


def serve(model: Any, **limits: Any) -> Service:
    """A service for an ``accel.Model``, or for a transformers model that is attached; ``limits`` as ``Service`` has."""
    attached = (model if isinstance(model, PreTrainedModel) else model.model).__dict__.get(STATE)
    if attached is None:
        raise AccelError("the model is not attached: accel.load(…) or accel.attach(model) first")
    return Service(attached, **limits)
