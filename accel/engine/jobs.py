"""What callers hand to a service, and what they are told: plain data and refusals (see service.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accel.errors import AccelError
from accel.sampling import LogitsPipeline

Finish = Literal["stop", "length", "abort"]


class QueueFullError(AccelError):
    """No room for another job: try again in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(AccelError):
    """The service takes no more jobs: it is shutting down, or its engine has died."""


@dataclass(frozen=True)
class Job:
    """A prompt and how its ``n`` continuations are drawn.

    ``pipeline`` makes the logits processors of one continuation, so that those with a state have one each; it should
    return the same object wherever that has no state, because rows of one pipeline are processed together.
    ``logprobs`` asks for the log-probability of every new token under the model's own distribution, and of so many
    of the most likely ones; ``prompt_logprobs`` for the same of the prompt's tokens.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    n: int = 1
    do_sample: bool = False
    seed: int | None = None
    pipeline: Callable[[], LogitsPipeline] = LogitsPipeline
    # tokens that end a continuation; the one that did is handed out as its last
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # names for accel's cartridge store; None for those that the model was loaded with
    cartridges: tuple[str, ...] | None = None
    # a decoding method and options for it, in place of those that the model was loaded with
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    # contexts are reused among jobs of one salt
    salt: str = ""
    # seconds from now after which the job is aborted
    timeout: float | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token, its rank (1 is the most likely), and the most likely ones, best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New tokens of continuation ``index`` (0 … n-1), in order; ``finish`` with the last ones.

    ``stop_token``: the one of ``Job.stop_tokens`` that ended it. ``prompt_logprobs`` come once, with the first piece
    of continuation 0: None for the first token of the prompt, which nothing predicts.
    """

    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: Finish | None = None
    stop_token: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    # with a continuation's first tokens: seconds that it waited before its prompt was begun
    queued: float | None = None


@dataclass(frozen=True)
class Done:
    """The job is over: all continuations have finished or were aborted. Nothing follows."""

    # tokens of the prompt that were not read again
    cached_tokens: int = 0
    # accel.Stats of this job's rows
    stats: Any = None


@dataclass(frozen=True)
class Failed:
    """The job could not be answered. Nothing follows."""

    error: Exception


Event = Piece | Done | Failed


@dataclass(frozen=True)
class Gauges:
    """Of a service: running and waiting continuations, bytes of context by kind, and sums over its life."""

    running: int = 0
    waiting: int = 0
    # "rows", "prefixes", "cartridges" → bytes of keys and values
    context_bytes: Mapping[str, int] = field(default_factory=dict)
    cartridges: tuple[str, ...] = ()
    # sums: tokens read from prompts, of these not read again, generated tokens, and drafting as in accel.Stats
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()
