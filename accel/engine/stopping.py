"""When a row is finished: length, end-of-sequence tokens, and transformers' stopping criteria, once a kept token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

from accel.types import Emission, Request

# criteria that look at one row at a time; anybody's own may compare rows
_ROWWISE = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria)


class Stopper(Protocol):
    """Told every final token in order; says how many of them count and whether the row is done."""

    def clip(self, emission: Emission) -> tuple[int, bool]: ...


def end_tokens(criteria: Sequence[StoppingCriteria]) -> frozenset[int]:
    """The tokens that end a row; a subclass may mean something else by its own."""
    ends = [c.eos_token_id.flatten().tolist() for c in criteria if type(c) is EosTokenCriteria]
    return frozenset(token for tokens in ends for token in tokens)


class CriteriaStopper:
    """transformers' criteria, applied to each row on its own.

    ``prompts`` ``[B, T]`` are shown to criteria in front of a row's new tokens, padding included. Length and
    end-of-sequence are compared as integers; the rest is called with ``[1, length]`` ids for every kept token.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], prompts: Tensor, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.eos = end_tokens(criteria)
        self.others = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        self.num_new = [0] * len(prompts)
        self._ids = prompts
        if self.others:
            self._ids = torch.cat([prompts, prompts.new_zeros(len(prompts), max_new_tokens)], dim=1)
        self._prompt_length = prompts.shape[1]
        self._scores: list[tuple[Tensor, ...]] = [()] * len(prompts)

    @staticmethod
    def is_rowwise(criteria: Sequence[StoppingCriteria]) -> bool:
        # exact types: a subclass may look at anything
        return all(type(c) in _ROWWISE for c in criteria)

    def clip(self, emission: Emission) -> tuple[int, bool]:
        """(tokens that count, finished) for one row's emission."""
        row = emission.request_id
        for index, token in enumerate(emission.tokens):
            self.num_new[row] += 1
            done = self.num_new[row] >= self.max_new_tokens or token in self.eos
            if self.others:
                end = self._prompt_length + self.num_new[row]
                self._ids[row, end - 1] = token
                if emission.scores is not None:
                    self._scores[row] += (emission.scores[index : index + 1],)
                ids = self._ids[row : row + 1, :end]
                # every criterion sees every token, as stateful ones expect
                votes = [c(ids, self._scores[row] or None) for c in self.others]
                # [1], or the plain bool that transformers puts up with
                done = done or any(bool(torch.as_tensor(vote).all()) for vote in votes)
            if done:
                return index + 1, True
        return len(emission.tokens), False


class RequestStopper:
    """Each request's own end: its length and its stop tokens. For requests that come and go."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Request, int]] = {}

    def add(self, requests: Sequence[Request]) -> None:
        self._open.update({request.id: (request, 0) for request in requests})

    def forget(self, request_ids: Iterable[int]) -> None:
        for id in request_ids:
            self._open.pop(id, None)

    def clip(self, emission: Emission) -> tuple[int, bool]:
        """(tokens that count, finished) for one row's emission."""
        request, count = self._open[emission.request_id]
        for index, token in enumerate(emission.tokens):
            if count + index + 1 >= request.max_new_tokens or token in request.stop_tokens:
                return index + 1, True
        self._open[emission.request_id] = request, count + len(emission.tokens)
        return len(emission.tokens), False


class TogetherStopper:
    """Criteria that may compare rows: called with the whole batch ``[B, length]``, all rows at the same length."""

    def __init__(self, criteria: Sequence[StoppingCriteria], prompts: Tensor, max_new_tokens: int) -> None:
        self._criteria = list(criteria)
        self._ids = torch.cat([prompts, prompts.new_zeros(len(prompts), max_new_tokens)], dim=1)
        self._prompt_length = prompts.shape[1]
        self._num_new = [0] * len(prompts)
        self._max_new_tokens = max_new_tokens
        self._verdict: list[bool] = [False] * len(prompts)
        self._scores: tuple[Tensor, ...] = ()

    def observe(self, emissions: Sequence[Emission]) -> None:
        """Take one token of every row, then ask the criteria once."""
        for emission in emissions:
            (token,) = emission.tokens
            self._ids[emission.request_id, self._prompt_length + self._num_new[emission.request_id]] = token
            self._num_new[emission.request_id] += 1
        ids = self._ids[:, : self._prompt_length + max(self._num_new)]
        scores = [e.scores for e in sorted(emissions, key=lambda e: e.request_id) if e.scores is not None]
        if scores:
            self._scores += (torch.cat(scores),)  # [B, V]
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self._criteria:
            done |= criterion(ids, self._scores or None)
        self._verdict = [a or b for a, b in zip(self._verdict, done.tolist(), strict=True)]

    def clip(self, emission: Emission) -> tuple[int, bool]:
        row = emission.request_id
        return 1, self._verdict[row] or self._num_new[row] >= self._max_new_tokens
