"""The engine's loop: admit what fits, step, clip, hand out. Knows nothing of any method or of transformers."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from accel.axes import Decoder
from accel.engine.stopping import Stopper, TogetherStopper
from accel.types import Chunk, Emission, Request


@runtime_checkable
class Holding(Protocol):
    """A decoder whose finished rows can stay in the batch."""

    def hold(self, request_ids: Sequence[int], token: int) -> None:
        """From now on these rows emit ``token``, whatever the target says."""


class Engine:
    """Runs requests through a decoder, at most ``max_rows`` at a time: the direct router (``accel.axes.Router``).

    ``in_step`` keeps finished rows in the batch until all are done, one token each a step: for logits processors
    and criteria that look at the batch as a whole. With ``pad`` these rows then read and show nothing but padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        stopper: Stopper,
        *,
        max_rows: int | None = None,
        in_step: bool = False,
        pad: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.stopper = stopper
        self.max_rows = max_rows
        self.in_step = in_step
        self.pad = pad
        self._waiting: deque[Request] = deque()
        self._running: set[int] = set()
        self._finished: set[int] = set()

    def answer(self, requests: Sequence[Request]) -> Generator[Chunk, None, None]:
        """Chunks of all requests, as their tokens become final. Rows are freed however the iteration ends."""
        self._waiting.extend(requests)
        try:
            while self._waiting or self._running:
                self._admit()
                yield from self._step()
        finally:
            self._evict(self._running)
            self._waiting.clear()

    def _admit(self) -> None:
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._running)
        batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if batch:
            # known as running first, so that a prefill that fails is cleaned up too
            self._running |= {request.id for request in batch}
            self.decoder.admit(batch)

    def _step(self) -> Iterator[Chunk]:
        emissions = self.decoder.step()
        if isinstance(self.stopper, TogetherStopper):
            self.stopper.observe(emissions)
        done: set[int] = set()
        for emission in emissions:
            if emission.request_id in self._finished:
                yield _chunk(emission, len(emission.tokens), finished=True, late=True)
                continue
            count, finished = self.stopper.clip(emission)
            if finished:
                done.add(emission.request_id)
                self.decoder.stats.discard(len(emission.tokens) - count)
            yield _chunk(emission, count, finished=finished, late=False)
        self._finished |= done
        if not self.in_step:
            self._evict(done)
        elif self._finished >= self._running:
            self._evict(self._running)
        elif done and self.pad is not None:
            assert isinstance(self.decoder, Holding), "only decoders of one token a step keep rows in step"
            self.decoder.hold(sorted(done), self.pad)

    def _evict(self, request_ids: set[int]) -> None:
        gone = sorted(request_ids)
        self._running -= set(gone)
        self._finished -= set(gone)
        self.decoder.evict(gone)


def _chunk(emission: Emission, count: int, *, finished: bool, late: bool) -> Chunk:
    return Chunk(
        emission.request_id,
        emission.tokens[:count],
        finished,
        late,
        None if emission.logits is None else emission.logits[:count],
        None if emission.scores is None else emission.scores[:count],
        emission.prompt,
    )
