"""What a service's thread does: jobs become rows of a shared batch, their tokens become events. Knows no threads."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from accel.engine.attached import Attached, method_for
from accel.engine.cartridges import Seat
from accel.engine.jobs import Done, Event, Failed, Finish, Job, Piece, QueueFullError, TokenLogprobs
from accel.engine.loop import Engine
from accel.engine.prefixes import Prefix, Prefixes
from accel.engine.stopping import RequestStopper
from accel.engine.transformers_call import row_seed
from accel.errors import IncompatibleError, OptionError
from accel.methods import MethodInfo
from accel.models.linear import LinearTarget
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget
from accel.types import Chunk, Request, Stats, options_from

log = logging.getLogger("accel")

# sets of options that have a decoder of their own at a time
MAX_LANES = 8
# a step that fails takes its rows with it; after so many in a row the model is taken for broken
MAX_FAILURES = 3
# how much of the memory that is free rows may fill
SHARE_OF_FREE_MEMORY = 0.5


@dataclass(eq=False)
class Lane:
    """One choice of method and options: its decoder's loop, and the rows in it."""

    engine: Engine
    stopper: RequestStopper
    stats: Stats
    rows: dict[int, Row] = field(default_factory=dict)
    failures: int = 0


@dataclass(eq=False)
class Row:
    """One continuation under way."""

    work: Work
    index: int
    request: Request
    new: list[int] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Work:
    """A job from the queue to its end."""

    number: int
    job: Job
    on_event: Callable[[Event], None]
    prompt: Tensor
    method: MethodInfo
    options: Any
    deadline: float | None
    # when it came, was given its first row, and was over
    since: float = field(default_factory=time.monotonic)
    opened: float | None = None
    ended: float = 0.0
    # continuations that are not admitted yet, and those that have not ended
    waiting: deque[int] = field(default_factory=deque)
    unfinished: set[int] = field(default_factory=set)
    seat: Seat | None = None
    held: ExitStack = field(default_factory=ExitStack)
    stats: Stats = field(default_factory=Stats)
    cached_tokens: int = 0
    base_seed: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class Batcher:
    """Rows of many jobs through one attached model, at most ``max_rows`` together, first come, first served.

    ``on_gone`` is told every job that is over, however it ended. ``check`` and ``work`` may be called from any thread,
    everything else from one.
    """

    def __init__(
        self,
        attached: Attached,
        *,
        max_rows: int,
        piece: int,
        prefix_bytes: int,
        context_bytes: int | None,
        on_gone: Callable[[Work], None],
    ) -> None:
        self.attached = attached
        self.model = attached.model
        self.max_rows, self.piece = max_rows, piece
        self.target = attached.target()
        self.vocab_size: int = self.target.vocab_size
        # positions that prompt and answer may take together; None where nothing runs out
        self.max_positions: int | None = getattr(self.target, "max_positions", None)
        # ids of objects are given out again, these numbers are not
        self._segment_names: weakref.WeakKeyDictionary[Segment, int] = weakref.WeakKeyDictionary()
        self.prefixes = Prefixes(prefix_bytes if _keeps_keys(self.target) else 0)
        self._bytes_per_token = _bytes_per_token(self.target)
        self._context_bytes = context_bytes or int(psutil.virtual_memory().available * SHARE_OF_FREE_MEMORY)
        self.lanes: dict[tuple[str, Any], Lane] = {}
        self.works: dict[int, Work] = {}
        self._queue: deque[Work] = deque()
        self._numbers, self._ids = itertools.count(1), itertools.count()
        # whose callers cannot be told anything any more
        self._deaf: list[int] = []
        self._on_gone = on_gone
        # what decoders counted that were given up since
        self.past = Stats()
        # over the batcher's life
        self.sums = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self.bytes: dict[str, int] = {}

    def work(self, job: Job, on_event: Callable[[Event], None]) -> Work:
        """A job that was found right, not queued yet; what is wrong with it is raised."""
        if job.n < 1 or job.max_new_tokens < 1:
            raise OptionError(f"n={job.n}, max_new_tokens={job.max_new_tokens}: both must be 1 or more")
        method, options = self._choice(job)
        if self.attached.facts is not None and (job.logprobs is not None or job.prompt_logprobs is not None):
            raise IncompatibleError("a masked-diffusion model has no log-probability of a token: leave logprobs out")
        for name in job.cartridges if job.cartridges is not None else ():
            if name not in self.attached.cartridges.store:
                known = ", ".join(self.attached.cartridges.store.names()) or "none"
                raise OptionError(f"no cartridge {name!r} here; there are: {known}")
        self.check(job.prompt, job.max_new_tokens)
        prompt = torch.tensor(list(job.prompt), dtype=torch.long, device=self.model.device)
        deadline = None if job.timeout is None else time.monotonic() + job.timeout
        work = Work(next(self._numbers), job, on_event, prompt, method, options, deadline)
        work.waiting.extend(range(job.n))
        work.unfinished.update(range(job.n))
        work.base_seed = secrets.randbits(62) if job.seed is None else job.seed
        return work

    def _choice(self, job: Job) -> tuple[MethodInfo, Any]:
        """The method and options that a job asks for, on top of the model's own."""
        own = self.attached
        info = own.method if job.method is None else method_for(own.model, job.method)
        if info.name == own.method.name and not job.options:
            return info, own.options
        cls = info.load_options()
        assert cls is not None, "every decoder has options"
        base = vars(own.options) if info.name == own.method.name else {}
        options = options_from(cls, {**base, **job.options}, f"method {info.name!r}")
        if own.facts is not None:
            options.plan(own.facts)
        return info, options

    def check(self, prompt: Sequence[int], new: int) -> None:
        """Refuse a prompt that cannot be read, or that leaves no room for ``new`` tokens."""
        if not len(prompt):
            raise OptionError("the prompt is empty: give at least one token")
        least, most = min(prompt), max(prompt)
        if least < 0 or most >= self.vocab_size:
            wrong = least if least < 0 else most
            raise OptionError(f"token id {wrong} is out of vocabulary: ids are 0 to {self.vocab_size - 1}")
        # the last token is never read
        if self.max_positions is not None and len(prompt) + new > self.max_positions + 1:
            raise OptionError(
                f"This model's maximum context length is {self.max_positions} tokens: the prompt has {len(prompt)} and "
                f"{new} are to follow; shorten the prompt or ask for fewer tokens"
            )
        if self._room_taken(1, len(prompt) + new) > self._context_bytes:
            raise OptionError(
                f"a context of {len(prompt) + new} tokens takes {self._room_taken(1, len(prompt) + new)} bytes, and "
                f"rows may take {self._context_bytes}: ask for fewer tokens"
            )

    def _room_taken(self, rows: int, length: int) -> int:
        """Bytes of keys and values of so many rows, the longest of ``length`` tokens, as they are stored."""
        return rows * self._bytes_per_token * (1 << max(0, length - 1).bit_length())

    # on the engine's thread

    def add(self, work: Work) -> None:
        """Queue a job."""
        self.works[work.number] = work
        self._queue.append(work)

    def turn(self) -> None:
        """Admit what fits and let every decoder step once."""
        now = time.monotonic()
        late = [each.number for each in self.works.values() if each.deadline is not None and each.deadline < now]
        for number in [*late, *self._deaf]:
            self.abort(number)
        self._deaf.clear()
        self._admit()
        for lane in list(self.lanes.values()):
            if lane.rows:
                self._step(lane)
        self.bytes = {
            "rows": self.target.state_bytes() if hasattr(self.target, "state_bytes") else 0,
            "prefixes": self.prefixes.nbytes(),
        }

    def _admit(self) -> None:
        """Give free rows to the jobs that have waited longest."""
        while self._queue:
            work = self._queue[0]
            lanes = self.lanes.values()
            requests = [row.request for lane in lanes for row in lane.rows.values()]
            room = self.max_rows - len(requests)
            lengths = [len(each.prompt) + each.max_new_tokens for each in requests]
            need = max([*lengths, len(work.prompt) + work.job.max_new_tokens])
            while room and self._room_taken(len(requests) + room, need) > self._context_bytes:
                room -= 1
            if not room and requests:
                return
            indices = [work.waiting.popleft() for _ in range(min(max(room, 1), len(work.waiting)))]
            if not work.waiting:
                self._queue.popleft()
            try:
                self._open(work, indices)
            except Exception as error:
                self.fail(work, error)

    def _open(self, work: Work, indices: Sequence[int]) -> None:
        job = work.job
        if work.seat is None:
            asked = None if job.cartridges is None else list(job.cartridges)
            (work.seat,) = work.held.enter_context(self.attached.cartridges.use(asked, 1))
            work.stats.cartridges = [each.name for each in work.seat.cartridges]
            self.attached.check_cartridges(work.stats.cartridges)
            self.check(job.prompt, job.max_new_tokens + work.seat.num_positions)
        lane = self._lane(work.method, work.options)
        first_time = 0 in indices
        prefix = None
        if job.prompt_logprobs is None and not getattr(self.target, "taps", None):
            prefix = self.prefixes.find(self._realm(work), job.prompt)
        if first_time:
            work.opened = time.monotonic()
            work.stats.method, work.stats.lossless = lane.stats.method, lane.stats.lossless
            work.stats.prompt_tokens = len(job.prompt)
            work.cached_tokens = 0 if prefix is None else prefix.num_tokens
            self.sums["prompt_tokens"] += len(job.prompt)
            self.sums["cached_tokens"] += work.cached_tokens
        rows = [Row(work, index, self._request(work, index, prefix)) for index in indices]
        for row in rows:
            # refused here, it is this job's fault alone
            lane.engine.decoder.check(row.request)
        lane.rows.update({row.request.id: row for row in rows})
        lane.stopper.add([row.request for row in rows])
        lane.engine.submit([row.request for row in rows])

    def _request(self, work: Work, index: int, prefix: Prefix | None) -> Request:
        job, seat = work.job, work.seat
        assert seat is not None, "a job sits down before its rows are made"
        wants_prompt = job.prompt_logprobs is not None and index == 0
        return Request(
            id=next(self._ids),
            prompt=work.prompt,
            max_new_tokens=job.max_new_tokens,
            history=work.prompt,
            do_sample=job.do_sample,
            seed=row_seed(work.base_seed, index),
            stop_tokens=job.stop_tokens,
            pipeline=job.pipeline(),
            keep_logits=job.logprobs is not None,
            segments=seat.segments,
            draft_segments=seat.draft_segments,
            prefix=prefix,
            on_prompt_logits=(lambda at, logits: self._prompt_logits(work, at, logits)) if wants_prompt else None,
            stats=work.stats,
        )

    def _lane(self, method: MethodInfo, options: Any) -> Lane:
        key = (method.name, options)
        if key not in self.lanes:
            idle = [known for known, lane in self.lanes.items() if not lane.rows]
            if len(self.lanes) >= MAX_LANES and idle:
                self.past.add_drafts(self.lanes.pop(idle[0]).stats)
            elif len(self.lanes) >= MAX_LANES:
                raise QueueFullError(f"{MAX_LANES} other sets of options are in use: try again", retry_after=1)
            draft = self.attached.draft if method.name == self.attached.method.name else None
            stats, stopper = Stats(), RequestStopper()
            decoder = self.attached.decoder_maker(method, options, draft)(self.target, stats, False)
            self.lanes[key] = Lane(Engine(decoder, stopper, piece=self.piece), stopper, stats)
        return self.lanes[key]

    def _step(self, lane: Lane) -> None:
        try:
            for chunk in lane.engine.step():
                self._hand_out(lane, chunk)
            lane.failures = 0
        except Exception as error:
            lane.failures += 1
            if lane.failures >= MAX_FAILURES:
                raise
            log.exception("a step failed: the jobs in it are given up")
            for work in {row.work.number: row.work for row in lane.rows.values()}.values():
                self.fail(work, error)

    def _hand_out(self, lane: Lane, chunk: Chunk) -> None:
        row = lane.rows.get(chunk.request_id)
        if row is None:  # its job was given up while this step's chunks were handed out
            return
        work = row.work
        queued = None
        if not row.new:
            queued = row.since - work.since
            self._keep_prompt(lane, row)
        row.new += chunk.tokens
        self.sums["generated_tokens"] += len(chunk.tokens)
        work.stats.generated_tokens += len(chunk.tokens)
        work.stats.discard(chunk.dropped, len(chunk.tokens) + chunk.dropped)
        finish: Finish | None = None
        stop = None
        if chunk.finished:
            stop = row.new[-1] if row.new[-1] in work.job.stop_tokens else None
            finish = "length" if stop is None else "stop"
        logprobs = None
        if work.job.logprobs is not None and chunk.logits is not None:
            logprobs = _logprobs(chunk.logits, chunk.tokens, work.job.logprobs)
        prompt_logprobs, work.prompt_logprobs = work.prompt_logprobs or None, []
        self._say(work, Piece(row.index, list(chunk.tokens), logprobs, finish, stop, prompt_logprobs, queued))
        if chunk.finished:
            self._keep_answer(lane, row)
            self._log(row)
            self._end(lane, row)

    def _end(self, lane: Lane, row: Row) -> None:
        """A continuation is over; with the last one the job is."""
        lane.rows.pop(row.request.id, None)
        lane.stopper.forget([row.request.id])
        work = row.work
        work.unfinished.discard(row.index)
        if not work.unfinished and work.number in self.works:
            self._forget(work)
            self._say(work, self._done(work))

    def _done(self, work: Work) -> Done:
        # passes are shared with other jobs' rows: counted here once for each of this job's
        work.stats.target_calls = work.stats.row_calls
        work.stats.seconds = {"queue": (work.opened or work.ended) - work.since, "total": work.ended - work.since}
        return Done(work.cached_tokens, work.stats)

    def abort(self, number: int) -> None:
        work = self.works.get(number)
        if work is None:
            return
        unfinished = sorted(work.unfinished)
        self._withdraw(work)
        self._forget(work)
        for index in unfinished:
            self._say(work, Piece(index, [], finish="abort"))
        self._say(work, self._done(work))

    def abort_all(self) -> None:
        for number in list(self.works):
            self.abort(number)

    def fail(self, work: Work, error: Exception) -> None:
        self._withdraw(work)
        self._forget(work)
        self._say(work, Failed(error))

    def lose(self, work: Work, event: Failed) -> None:
        """Tell a job's caller that nothing follows, where the rows cannot even be taken out."""
        self._say(work, event)
        self._forget(work)

    def _withdraw(self, work: Work) -> None:
        """Take a job's rows out of the decoders, and what waits out of the queue."""
        if work in self._queue:
            self._queue.remove(work)
        for lane in self.lanes.values():
            ids = [id for id, row in lane.rows.items() if row.work is work]
            lane.engine.cancel(ids)
            lane.stopper.forget(ids)
            for id in ids:
                del lane.rows[id]

    def _forget(self, work: Work) -> None:
        work.held.close()
        work.ended = time.monotonic()
        if self.works.pop(work.number, None) is not None:
            self._on_gone(work)

    def _say(self, work: Work, event: Event) -> None:
        try:
            work.on_event(event)
        except Exception:
            # somebody who cannot listen must not stop the others; there is nobody left to tell
            log.exception("a caller's on_event failed")
            if work.number in self.works and not isinstance(event, Done | Failed):
                self._deaf.append(work.number)

    # contexts that may be read again

    def _realm(self, work: Work) -> tuple[object, ...]:
        assert work.seat is not None, "a job sits down before it reads"
        names = [self._segment_names.setdefault(segment, next(self._numbers)) for segment in work.seat.segments]
        return (work.job.salt, *names)

    def _keep_prompt(self, lane: Lane, row: Row) -> None:
        if self.prefixes.max_bytes and not self.prefixes.covers(self._realm(row.work), row.work.job.prompt):
            self._keep(lane, row, list(row.work.job.prompt))

    def _keep_answer(self, lane: Lane, row: Row) -> None:
        if self.prefixes.max_bytes:
            self._keep(lane, row, [*row.work.job.prompt, *row.new])

    def _keep(self, lane: Lane, row: Row, tokens: list[int]) -> None:
        """Keep what a live row holds: its tail, or the prompt that it shares with the job's other continuations."""
        live = getattr(lane.engine.decoder, "live", {}).get(row.request.id)
        if live is None:
            return
        cache, shared = self.target.cache, len(row.request.segments)
        state = cache.rows[live.row]
        if len(state.segments) == shared and 0 < state.tail_length <= len(tokens):
            self.prefixes.keep(self._realm(row.work), tokens[: state.tail_length], cache.copy(live.row))
        elif len(state.segments) == shared + 1 and not state.tail_length:
            self.prefixes.keep(self._realm(row.work), row.work.job.prompt, state.segments[-1])

    # what else callers ask for

    def _prompt_logits(self, work: Work, first: int, logits: Tensor) -> None:
        assert work.job.prompt_logprobs is not None, "only asked for where wanted"
        if first == 0:
            work.prompt_logprobs = [None]
        following = list(work.job.prompt[first + 1 : first + 1 + len(logits)])
        work.prompt_logprobs += _logprobs(logits[: len(following)].float(), following, work.job.prompt_logprobs)

    def _log(self, row: Row) -> None:
        """Put a finished row into the request log, if there is one; not behind cartridges, which a draft lacks."""
        requests = self.attached.request_log
        if requests is not None and not row.request.segments:
            problem = requests.append(list(row.work.job.prompt), row.new)
            if problem is not None:
                log.warning("%s", problem)

    def embedding(self, prompt: Sequence[int]) -> list[float]:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
        found: list[float] = (hidden / hidden.norm().clamp(min=1e-12)).tolist()
        return found


def _keeps_keys(target: Any) -> bool:
    """Whether rows are keys and values of their tokens alone, and no state."""
    return isinstance(target, SoftmaxTarget) and not isinstance(target, LinearTarget)


def _bytes_per_token(target: Any) -> int:
    """Keys and values of one position in all layers; 0 where rows have none or a state of one size."""
    if not _keeps_keys(target):
        return 0
    config, model = target.config, target.model
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bits = torch.finfo(model.dtype).bits if model.dtype.is_floating_point else 32
    return int(2 * config.num_hidden_layers * heads * size * bits // 8)


def _logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens`` [k] under raw logits ``[k, V]``, with the ``count`` most likely at each place."""
    if not tokens:
        return []
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = (scores > chosen).sum(-1) + 1
    values, ids = scores.topk(count) if count else (scores[:, :0], scores[:, :0].long())
    rows = zip(tokens, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(top, top_values, strict=True)))
        for token, logprob, rank, top, top_values in rows
    ]
