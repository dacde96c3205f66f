"""The engine's loop: admit what fits, step, clip, hand out. Knows nothing of any method or of transformers."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from accel.axes import Decoder
from accel.engine.stopping import Stopper, TogetherStopper
from accel.types import Chunk, Emission, Request


@runtime_checkable
class Holding(Protocol):
    """A decoder whose finished rows can stay in the batch."""

    def hold(self, request_ids: Sequence[int], token: int) -> None:
        """From now on these rows emit ``token``, whatever the target says."""


@runtime_checkable
class Piecewise(Protocol):
    """A decoder that can read prompts in pieces, between which other rows go on (see ``RowDecoder``)."""

    def begin(self, requests: Sequence[Request]) -> int: ...
    def read(self, request_id: int, most: int) -> int: ...


class Engine:
    """Runs requests through a decoder, at most ``max_rows`` at a time: the direct router (``accel.axes.Router``).

    ``answer`` runs some to their end; ``submit``, ``step`` and ``cancel`` let them come and go at any time. With
    ``piece`` no step reads more than so many tokens of new prompts, so that those under way do not wait for long ones.
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
        piece: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.stopper = stopper
        self.max_rows = max_rows
        self.in_step = in_step
        self.pad = pad
        self.piece = piece if isinstance(decoder, Piecewise) else None
        # prompts that are being read, in the order they came: their requests, and how many tokens are left
        self._reading: deque[tuple[list[int], int]] = deque()
        self._waiting: deque[Request] = deque()
        self._running: set[int] = set()
        self._finished: set[int] = set()

    def answer(self, requests: Sequence[Request]) -> Generator[Chunk, None, None]:
        """Chunks of all requests, as their tokens become final. Rows are freed however the iteration ends."""
        self.submit(requests)
        try:
            while self.is_busy:
                yield from self.step()
        finally:
            self._evict(self._running)
            self._waiting.clear()

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; those that come together and have one prompt object are read once."""
        self._waiting.extend(requests)

    def cancel(self, request_ids: Collection[int]) -> None:
        """Drop requests, wherever they are; ids that are gone are fine."""
        gone = set(request_ids)
        self._waiting = deque(request for request in self._waiting if request.id not in gone)
        self._evict(self._running & gone)

    def step(self) -> Iterator[Chunk]:
        """Admit what fits, let the decoder step once, and hand out what is final."""
        self._admit()
        yield from self._step()

    def _admit(self) -> None:
        if self.piece is not None:
            self._read(self.piece)
            return
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._running)
        batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if batch:
            # known as running first, so that a prefill that fails is cleaned up too
            self._running |= {request.id for request in batch}
            self.decoder.admit(batch)

    def _read(self, budget: int) -> None:
        """Go on with prompts that were begun, then begin others, up to ``budget`` tokens in all."""
        decoder = self.decoder
        assert isinstance(decoder, Piecewise), "a piece is for decoders that read in pieces"
        while budget > 0:
            if not self._reading and not self._begin(decoder):
                return
            ids, left = self._reading[0]
            now = decoder.read(ids[0], min(budget, left))
            budget -= left - now
            self._reading.popleft()
            if now:
                self._reading.appendleft((ids, now))

    def _begin(self, decoder: Piecewise) -> bool:
        """Begin the prompt of the next requests that wait, if there is one and room for it."""
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._running)
        if not self._waiting or room < 1:
            return False
        batch = [self._waiting.popleft()]
        while self._waiting and len(batch) < room and self._waiting[0].prompt is batch[0].prompt:
            batch.append(self._waiting.popleft())
        self._running |= {request.id for request in batch}
        self._reading.append(([request.id for request in batch], decoder.begin(batch)))
        return True

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
                self.decoder.stats.discard(len(emission.tokens) - count, len(emission.tokens))
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
        if not gone:
            return
        self._running -= set(gone)
        self._finished -= set(gone)
        readings = [([id for id in ids if id not in gone], left) for ids, left in self._reading]
        self._reading = deque(each for each in readings if each[0])
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
        len(emission.tokens) - count,
    )
