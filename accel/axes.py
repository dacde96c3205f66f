"""The three contracts that every method plugs into, one each. Composition happens here and nowhere else.

Target: what computes the logits.  Decoder: how tokens are decided.  Router: who answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from accel.types import Chunk, Emission, Request, Stats


@runtime_checkable
class Target(Protocol):
    """A model that can take back tokens: what verification needs, whatever the state is made of.

    Rows are named by ints and independent: a row's logits do not depend on its neighbours, its padding or when it
    was opened. Names are Python ints, and lengths are kept on the host, so that no step waits for the device to
    learn what the host decided itself.
    """

    vocab_size: int
    # positions the model has, None where nothing runs out (alibi, recurrent state)
    max_positions: int | None
    device: torch.device

    def open(self, segments: Iterable[object] = ()) -> int: ...
    def close(self, rows: Iterable[int]) -> None: ...

    def fork(self, row: int, copies: int) -> list[int]:
        """``copies`` new rows with the context of ``row``, sharing it."""

    def num_positions(self, row: int) -> int:
        """Position of the row's next token."""

    def place(self, row: int) -> int:
        """Where the row lies: ``forward`` is fastest with rows in this order."""

    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        """[R, n] → logits [R, n, V]: n more tentative positions behind those that are tentative already.

        ``keep`` asks for the logits of some of the n positions only. ``final`` promises that the next commit keeps
        exactly final[r] of the n, as after a prompt whose rows are padded on the right: a recurrent state then needs
        no way back.
        """

    def commit(self, keep: Sequence[int], rows: Sequence[int]) -> None:
        """Keep the first ``keep[r]`` tentative positions of each row and drop the rest."""

    def state_bytes(self) -> int: ...


@runtime_checkable
class Ragged(Protocol):
    """A target that reads rows of different lengths for the price of what they have."""

    def forward_ragged(self, tokens: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """``forward`` of the first lengths[r] ≥ 1 of each row's tokens ``[R, n]`` → logits ``[lengths[r], V]`` each."""


@runtime_checkable
class Branching(Protocol):
    """A target that reads several continuations of one row at once, and keeps the tokens of one of them."""

    def may_branch(self, row: int) -> bool:
        """Whether it can do so for this row now."""

    def forward_branches(self, tokens: Tensor, row: int, depths: Sequence[int]) -> Tensor:
        """``forward`` of tokens ``[n]`` of one row → logits ``[n, V]``.

        Token i is ``depths[i]`` ≤ i positions behind the row; of the new ones it sees the first depths[i] and itself.
        """

    def commit_path(self, path: Sequence[int], row: int) -> None:
        """Keep the tentative positions ``path``, which ascend and follow on one another, and drop the rest."""


@runtime_checkable
class Decoder(Protocol):
    """Turns admitted requests into final tokens, a step at a time."""

    stats: Stats

    def check(self, request: Request) -> None:
        """Refuse what cannot be decoded this way."""

    def admit(self, requests: Sequence[Request]) -> None:
        """Prefill the requests' prompts into new rows."""

    def step(self) -> list[Emission]:
        """Tokens that are now final, for the live rows that gained any."""

    def evict(self, request_ids: Sequence[int]) -> None:
        """Drop rows, finished or not."""


@runtime_checkable
class Router(Protocol):
    """Decides who answers a request and hands out the answer in pieces."""

    def answer(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Chunks of all requests as their tokens become final; each request's last one is ``finished``."""
