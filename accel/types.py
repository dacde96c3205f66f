"""The plain data that crosses axes: requests, emissions, chunks and stats. Knows nothing of models or methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One row to decode: a prompt and how its tokens are to be drawn.

    ``prompt`` is int64 ``[T]`` without padding, on the target's device. ``history`` is what logits
    processors are shown before the first new token, int64 ``[T']``: the prompt, with the batch's left
    padding where there was one. ``seed`` seeds the row's own generator, so that a row's tokens never
    depend on its neighbours. ``max_new_tokens`` bounds how far the decoder may look ahead.
    """

    id: int
    prompt: Tensor
    max_new_tokens: int
    history: Tensor
    do_sample: bool = False
    seed: int = 0
    # tokens that end the row: a decoder that looks ahead has nothing to look for behind them
    stop_tokens: frozenset[int] = frozenset()
    # accel.engine.sampling.LogitsPipeline: raw logits → the scores tokens are drawn from
    pipeline: Any = None
    # keep raw logits / processed scores of every kept token, for return_dict_in_generate
    keep_logits: bool = False
    keep_scores: bool = False
    # immutable context in front of the prompt, shared with other rows (accel.models.row_cache.Segment), in order
    segments: tuple[Any, ...] = ()
    # the same for a draft model, which reads the prompt alone where there is none
    draft_segments: tuple[Any, ...] = ()
    # keys and values of the prompt's first tokens, where another row has read them (accel.engine.prefixes.Prefix);
    # they are copied, and at least one token of the prompt is left to read
    prefix: Any = None
    # told raw logits [n, V] of the prompt's positions and the first of these, in order, while the prompt is read
    on_prompt_logits: Callable[[int, Tensor], None] | None = None
    # figures of this request alone, beside the decoder's: rounds, drafted and accepted tokens
    stats: Stats | None = None


@dataclass(frozen=True)
class Emission:
    """Tokens of one row that are now final, in order; ``logits`` and ``scores`` [k, V] when asked for.

    ``prompt``: where the prompt had gaps, what it became, once: no later than with the row's first tokens.
    """

    request_id: int
    tokens: list[int]
    logits: Tensor | None = None
    scores: Tensor | None = None
    prompt: list[int] | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens of one request that count, in order, and whether they are its last.

    ``late`` marks what a row still produced after its end, which happens only to rows that are kept in step.
    """

    request_id: int
    tokens: list[int]
    finished: bool
    late: bool = False
    logits: Tensor | None = None
    scores: Tensor | None = None
    # the prompt without its gaps, where it had some
    prompt: list[int] | None = None
    # tokens that the decoder made final behind the row's end
    dropped: int = 0


@dataclass
class Stats:
    """What a person needs to believe a speed-up. Counts are sums over the rows of one call."""

    method: str = "plain"
    lossless: bool = True
    # the cartridges that the call's rows read, by name, each once; their tokens are no prompt tokens
    cartridges: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    # forward passes of the target after prefill, each counted once whatever its batch
    target_calls: int = 0
    # the same passes counted once for every live row, the denominator of per-row rates
    row_calls: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    # accepted_by_position[i]: how often the draft's token i was kept; drafted_by_position[i]: how often there was one
    accepted_by_position: list[int] = field(default_factory=list)
    drafted_by_position: list[int] = field(default_factory=list)
    # measured time of drafting one token over that of one target step (c); None where nothing was drafted
    cost_ratio: float | None = None
    state_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    # what else the caller should know, one sentence each ("fell back to …")
    notes: list[str] = field(default_factory=list)

    @property
    def mean_accepted_length(self) -> float:
        """τ, the block efficiency: tokens a row gains from one target call (1.0 is plain decoding)."""
        return 1.0 + self.accepted_tokens / self.row_calls if self.row_calls else 1.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_forward(self) -> float:
        """TPF: generated tokens over target forwards, padding excluded."""
        return self.generated_tokens / self.target_calls if self.target_calls else 0.0

    def count(self, drafted: int, accepted: int) -> None:
        """Record one row's round: ``drafted`` tokens proposed, the first ``accepted`` of them kept."""
        for length, counts in ((drafted, self.drafted_by_position), (accepted, self.accepted_by_position)):
            counts.extend([0] * (length - len(counts)))
            for position in range(length):
                counts[position] += 1
        self.row_calls += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted

    def add_drafts(self, other: Stats) -> None:
        """Add another's counts of rounds and drafts."""
        for name in ("drafted_by_position", "accepted_by_position"):
            pairs = zip_longest(getattr(self, name), getattr(other, name), fillvalue=0)
            setattr(self, name, [a + b for a, b in pairs])
        for name in ("target_calls", "row_calls", "drafted_tokens", "accepted_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def discard(self, tokens: int, emitted: int) -> None:
        """Take back accepted tokens: of ``emitted`` the last ``tokens`` fell behind a row's end (stop, length).

        The last that counts is then the target's own, whoever guessed it.
        """
        self.accepted_tokens -= min(tokens, self.accepted_tokens)
        for position in range(emitted - 1 - tokens, min(emitted - 1, len(self.accepted_by_position))):
            self.accepted_by_position[position] -= 1

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, ready for JSON."""
        derived = {
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_forward": self.tokens_per_forward,
        }
        return {**dataclasses.asdict(self), **derived}


def options_from(cls: type, given: Mapping[str, Any], owner: str) -> Any:
    """Build the options dataclass ``cls`` from keyword arguments; an unknown name is refused with the known ones."""
    from accel.errors import OptionError, unknown_name

    known = {f.name for f in dataclasses.fields(cls)}
    for name in given:
        if name not in known:
            raise OptionError(unknown_name(f"option for {owner}:", name, known))
    return cls(**given)
