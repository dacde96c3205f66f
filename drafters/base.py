"""What a drafter is: something that guesses a row's next tokens. Knows of the target that checks them by name only.

Rows are named by the caller (any int). A drafter sees every final token exactly once, through ``open`` (the
prompt) and ``observe`` (what the target kept), and must never assume that a proposal was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from accel.axes import Target
from accel.models.row_cache import Segment


@dataclass(frozen=True)
class Beside:
    """Another token that a drafter thinks of in the place of its guess's token ``depth`` (0 is the first).

    ``confidence`` is its drafter's belief that it is the one, ``source`` who thinks so where that is not who drafted.
    """

    depth: int
    token: int
    confidence: float
    source: str = ""


@dataclass(frozen=True)
class Draft:
    """A guess at a row's next tokens, in the target's vocabulary.

    ``tokens``: k ids, k ≥ 0. ``probs``: float ``[k, V]``, the distributions the tokens were *sampled* from, or
    None for a deterministic guess (a point mass: it is then accepted with the target's own probability of it).
    ``confidence``: k numbers in [0, 1], the drafter's own belief in each token; calibrated by the caller.
    ``beside``: what else the tokens might be, where that was asked for.
    """

    tokens: list[int] = field(default_factory=list)
    probs: Tensor | None = None
    confidence: list[float] = field(default_factory=list)
    source: str = ""
    beside: list[Beside] = field(default_factory=list)


@dataclass(frozen=True)
class Ask:
    """One row's wish in a round of drafting.

    ``max_tokens`` bounds the guess. ``sample`` asks for tokens drawn from the drafter's distribution (with
    ``probs``) where it has one; ``warp`` [n, V] → [n, V] applies the row's own temperature and truncation to the
    drafter's logits; unless it ``names_tokens``, V may be any part of the vocabulary. ``keep_going(confidences) ->
    bool`` is asked after each token by drafters whose tokens cost something: False ends the row's draft early.
    ``free_only``: of a drafter with several parts, only those whose tokens cost nothing are to be asked. ``passes``:
    how many forward passes a drafter that fills a block at once may take for it. ``beside``: how many other tokens are
    of use in the place of each token that is not sampled, where the drafter knows some at no cost.
    """

    row: int
    max_tokens: int
    sample: bool = False
    warp: Callable[[Tensor], Tensor] | None = None
    names_tokens: bool = False
    keep_going: Callable[[Sequence[float]], bool] | None = None
    free_only: bool = False
    passes: int = 1
    beside: int = 0


@runtime_checkable
class Drafter(Protocol):
    """See the module's docstring for the order of calls: open, then (propose, observe)*, then close.

    One that guesses a whole block for the price of one token has ``at_once = True`` beside ``free = False``.
    """

    name: str
    # True where proposing is so cheap (microseconds) that a wrong guess costs only its verification
    free: bool

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None: ...
    def propose(self, asks: Sequence[Ask]) -> list[Draft]: ...
    def observe(self, row: int, tokens: Sequence[int]) -> None: ...
    def close(self, row: int) -> None: ...
    def state_bytes(self) -> int: ...


@runtime_checkable
class TargetReader(Protocol):
    """A drafter that reads, besides tokens, what the target itself computes for a row.

    ``listen`` comes before the target reads anything, ``follow`` behind ``open``: it says which row of the target
    the drafter's row is.
    """

    def listen(self, target: Target) -> None: ...
    def follow(self, row: int, target: Target, target_row: int) -> None: ...


@runtime_checkable
class SegmentReader(Protocol):
    """A drafter whose rows may begin behind immutable context of its own model: ``open_behind`` instead of ``open``."""

    def open_behind(self, segments: Sequence[Segment], row: int, prompt: Sequence[int], seed: int) -> None: ...


def open_row(drafter: Drafter, segments: Sequence[Segment], row: int, prompt: Sequence[int], seed: int) -> None:
    """Open a row behind ``segments`` where there are any and the drafter can read them, else on the prompt alone."""
    if segments and isinstance(drafter, SegmentReader):
        drafter.open_behind(segments, row, prompt, seed)
    else:
        drafter.open(row, prompt, seed)


def leaves(drafter: Drafter) -> list[Drafter]:
    """Who really drafts: ``drafter`` itself, or those of its ``parts`` where it has any."""
    parts = getattr(drafter, "parts", ())
    return [leaf for part in parts for leaf in leaves(part)] if parts else [drafter]


def drafts_at_once(drafter: Drafter) -> bool:
    """Whether what costs something in ``drafter`` costs the same however many tokens it guesses."""
    paid = [leaf for leaf in leaves(drafter) if not leaf.free]
    return bool(paid) and all(getattr(leaf, "at_once", False) for leaf in paid)


def target_readers(drafter: Drafter) -> list[TargetReader]:
    """``drafter`` itself where it reads the target, and those of its ``parts`` that do, where it has any."""
    own = [drafter] if isinstance(drafter, TargetReader) else []
    return own + [reader for part in getattr(drafter, "parts", ()) for reader in target_readers(part)]
