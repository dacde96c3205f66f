"""Plain decoding: one token a step and row. Also the row bookkeeping that other decoders build on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.axes import Target
from accel.sampling import RowSampler, batch_scores, draw_rows
from accel.types import Emission, Request, Stats


@dataclass(frozen=True)
class PlainOptions:
    """Plain decoding has no options of its own."""


@dataclass
class LiveRow:
    """A request being decoded: its row in the target and the last final token, which the target has not read yet."""

    request: Request
    row: int
    sampler: RowSampler
    pending: int = 0
    num_emitted: int = 0
    # the token that stands for whatever would be drawn, once the row has ended and only keeps its neighbours company
    held: int | None = None

    @property
    def num_left(self) -> int:
        """Tokens the request may still gain."""
        return self.request.max_new_tokens - self.num_emitted


@dataclass
class Reading:
    """Requests with one prompt that is being read, in pieces, into ``row``."""

    requests: list[Request]
    row: int
    num_read: int = 0


class RowDecoder:
    """Admission, prefill and eviction of independent rows; subclasses say what a step is.

    Prompts are read whole by ``admit``, or in pieces by ``begin`` and ``read``, between which other rows go on.
    """

    def __init__(self, target: Target, stats: Stats) -> None:
        self.target = target
        self.stats = stats
        self.live: dict[int, LiveRow] = {}
        self._reading: dict[int, Reading] = {}
        self._ready: list[Emission] = []

    def check(self, request: Request) -> None:
        """Refuse what this decoder cannot do; called before a request is admitted."""

    def admit(self, requests: Sequence[Request]) -> None:
        """Prefill the prompts and draw each row's first token, which the next step() hands out.

        Requests with the same prompt behind the same segments share one prefill and one copy of its state.
        """
        start = time.perf_counter()
        for request in requests:
            self.check(request)
        groups: dict[tuple[object, ...], list[Request]] = {}
        for request in requests:
            context = tuple(id(segment) for segment in request.segments)
            groups.setdefault((context, *request.prompt.tolist()), []).append(request)
        # padding a batch of prompts wastes arithmetic, which a CPU has none to spare of
        batches = [[g] for g in groups.values()] if self.target.device.type == "cpu" else [list(groups.values())]
        admitted: list[LiveRow] = []
        first_logits: list[Tensor] = []
        for batch in batches:
            prompts = [group[0].prompt for group in batch]
            rows = [self.target.open(group[0].segments) for group in batch]
            for group, row, logits in zip(batch, rows, self._prefill(prompts, rows), strict=True):
                copies = self.target.fork(row, len(group) - 1) if len(group) > 1 else []
                for request, name in zip(group, [row, *copies], strict=True):
                    admitted.append(LiveRow(request, name, RowSampler(request)))
                    first_logits.append(logits)
        place = {request.id: index for index, request in enumerate(requests)}
        order = sorted(range(len(admitted)), key=lambda i: place[admitted[i].request.id])
        self._go_live([admitted[i] for i in order], torch.stack([first_logits[i] for i in order]))
        self.stats.add_seconds("prefill", time.perf_counter() - start)

    def begin(self, requests: Sequence[Request]) -> int:
        """Open a row for requests with the same prompt behind the same segments; returns how much is left to read."""
        first = requests[0]
        reading = Reading(list(requests), self.target.open(first.segments))
        if first.prefix is not None:
            reading.num_read = min(first.prefix.num_tokens, len(first.prompt) - 1)
            self.target.cache.fill(reading.row, first.prefix.segment, reading.num_read)  # type: ignore[attr-defined]
        self._reading.update({request.id: reading for request in requests})
        return len(first.prompt) - reading.num_read

    def read(self, request_id: int, most: int) -> int:
        """Read up to ``most`` more tokens of a prompt that was begun; returns how many are left.

        With the last of them its requests are live, and the next step() hands out their first tokens.
        """
        start = time.perf_counter()
        reading = self._reading[request_id]
        first = reading.requests[0]
        piece = first.prompt[reading.num_read : reading.num_read + most]
        n = len(piece)
        keep = None if first.on_prompt_logits is not None else [n - 1]
        logits = self.target.forward(piece[None], [reading.row], keep=keep, final=[n])[0]
        self.target.commit([n], [reading.row])
        if first.on_prompt_logits is not None:
            first.on_prompt_logits(reading.num_read, logits)
        reading.num_read += n
        left = len(first.prompt) - reading.num_read
        if left == 0:
            others = len(reading.requests) - 1
            rows = [reading.row, *(self.target.fork(reading.row, others) if others else [])]
            admitted = [LiveRow(each, row, RowSampler(each)) for each, row in zip(reading.requests, rows, strict=True)]
            for request in reading.requests:
                del self._reading[request.id]
            self._go_live(admitted, logits[-1:].expand(len(admitted), -1))
        self.stats.add_seconds("prefill", time.perf_counter() - start)
        return left

    def _go_live(self, admitted: Sequence[LiveRow], logits: Tensor) -> None:
        """Rows whose prompts have been read, and the logits ``[R, V]`` of their first tokens."""
        self.live.update({live.request.id: live for live in admitted})
        # rows side by side in memory are read without a copy
        self.live = dict(sorted(self.live.items(), key=lambda item: self.target.place(item[1].row)))
        self.stats.prompt_tokens += sum(len(live.request.prompt) for live in admitted)
        self.on_admitted(admitted)
        self._ready += self.emit_one_each(admitted, logits)

    def evict(self, request_ids: Sequence[int]) -> None:
        """Drop rows, finished or not; ids that were never admitted are fine."""
        # continuations of one prompt share a reading, which may lose some of them or all
        popped = [self._reading.pop(id) for id in request_ids if id in self._reading]
        for reading in {each.row: each for each in popped}.values():
            reading.requests = [each for each in reading.requests if each.id in self._reading]
            if not reading.requests:
                self.target.close([reading.row])
        gone = [self.live.pop(id) for id in request_ids if id in self.live]
        if gone:  # contexts only grow until a row ends: the peak is at one of the ends
            self.stats.state_bytes = max(self.stats.state_bytes, self.target.state_bytes())
        self.target.close([live.row for live in gone])
        if gone:
            self.live = dict(sorted(self.live.items(), key=lambda item: self.target.place(item[1].row)))
        self.on_evicted(gone)

    def step(self) -> list[Emission]:
        """The tokens that are final now; the first call after an admission hands out the prefill's own."""
        ready, self._ready = self._ready, []
        return [e for e in ready if e.request_id in self.live] or (self.advance() if self.live else [])

    def advance(self) -> list[Emission]:
        """One round of target work over all live rows."""
        raise TypeError(f"{type(self).__name__} must say what a step is")

    def on_admitted(self, rows: Sequence[LiveRow]) -> None:
        """Called with rows whose prompts are prefilled, before their first token is drawn."""

    def on_evicted(self, rows: Sequence[LiveRow]) -> None:
        """Called with rows that were dropped."""

    def emit_one_each(self, rows: Sequence[LiveRow], logits: Tensor) -> list[Emission]:
        """Draw one token a row from raw logits ``[R, V]``."""
        needs_scores = any(r.request.keep_scores or not r.sampler.is_argmax for r in rows)
        scores = batch_scores([r.sampler for r in rows], logits) if needs_scores else logits
        drawn = draw_rows([r.sampler for r in rows], scores)
        tokens = [token if live.held is None else live.held for live, token in zip(rows, drawn, strict=True)]
        return [
            self.emit(live, [token], logits[i : i + 1], scores[i : i + 1])
            for i, (live, token) in enumerate(zip(rows, tokens, strict=True))
        ]

    def emit(self, live: LiveRow, tokens: list[int], logits: Tensor, scores: Tensor | None) -> Emission:
        """Make tokens final: remember the last as pending, extend the row's history. logits, scores ``[k, V]``."""
        live.pending = tokens[-1]
        live.num_emitted += len(tokens)
        live.sampler.push(tokens)
        keep_scores = live.request.keep_scores and scores is not None
        return Emission(
            live.request.id,
            tokens,
            logits.float() if live.request.keep_logits else None,
            scores.float() if keep_scores and scores is not None else None,
        )

    def _prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Read whole prompts into fresh rows; returns the logits after each, ``[R, V]``."""
        lengths = [len(p) for p in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)  # [R, longest]
        ends = sorted({length - 1 for length in lengths})
        logits = self.target.forward(tokens, rows, keep=ends, final=lengths)  # [R, len(ends), V]
        self.target.commit(lengths, rows)
        return torch.stack([logits[i, ends.index(length - 1)] for i, length in enumerate(lengths)])


class PlainDecoder(RowDecoder):
    """One target forward a step, one token a row."""

    def __init__(self, target: Target, options: PlainOptions, stats: Stats) -> None:
        super().__init__(target, stats)
        stats.method, stats.lossless = "plain", True

    def hold(self, request_ids: Sequence[int], token: int) -> None:
        """From now on these rows emit ``token``, whatever the target says."""
        for id in request_ids:
            self.live[id].held = token

    def advance(self) -> list[Emission]:
        start = time.perf_counter()
        rows = list(self.live.values())
        names = [live.row for live in rows]
        tokens = torch.tensor([[live.pending] for live in rows], device=self.target.device)
        logits = self.target.forward(tokens, names, keep=[0], final=[1] * len(rows))[:, 0]
        self.target.commit([1] * len(rows), names)
        emissions = self.emit_one_each(rows, logits)
        for live in rows:
            if live.request.stats is not None:
                live.request.stats.count(0, 0)
        self.stats.target_calls += 1
        self.stats.row_calls += len(rows)
        self.stats.add_seconds("decode", time.perf_counter() - start)
        return emissions
