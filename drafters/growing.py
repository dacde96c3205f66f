"""A row's draft while it grows, for drafters whose models say more than one token. Knows logits, no models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from accel.drafters.base import Ask, Draft
from accel.drafters.draw import draw


class HasGenerator(Protocol):
    """A drafter's own record of a row; its randomness is the row's alone."""

    generator: torch.Generator


Row = TypeVar("Row", bound=HasGenerator)


@dataclass
class Growing(Generic[Row]):
    """What was drafted so far, in the target's ids."""

    ask: Ask
    row: Row
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def sample(self, logits: Tensor, d2t: Tensor | None, vocab_size: int) -> None:
        """Draw a token from logits over the draft's vocabulary ``[V]``, after the row's own warping.

        ``d2t`` holds the target ids of that vocabulary, None where it is the target's own of ``vocab_size`` tokens. A
        small vocabulary is warped and drawn from as it is: over all of the target's tokens that would cost more than
        a small draft model itself.
        """
        scores = logits.float()
        if d2t is not None and self.ask.names_tokens:
            scores, d2t = _spread(scores, d2t, vocab_size, -torch.inf), None
        if self.ask.warp is not None:
            scores = self.ask.warp(scores[None])[0]
        probabilities = scores.softmax(-1)
        choice = draw(probabilities, self.row.generator)
        self.tokens.append(choice if d2t is None else int(d2t[choice]))
        self.confidence.append(float(probabilities[choice]))
        self.probs.append(probabilities if d2t is None else _spread(probabilities, d2t, vocab_size, 0.0))

    def wants_more(self) -> bool:
        if len(self.tokens) >= self.ask.max_tokens:
            return False
        return self.ask.keep_going is None or self.ask.keep_going(self.confidence)

    def finish(self, source: str) -> Draft:
        probs = torch.stack(self.probs) if self.probs else None
        return Draft(self.tokens, probs, self.confidence, source)


def likeliest(logits: Tensor) -> tuple[int, float]:
    """The first of the likeliest tokens of logits ``[V]``, and its probability."""
    if logits.device.type != "cpu":
        best = logits.float().softmax(-1).max(-1)
        return int(best.indices), float(best.values)
    # numpy on a CPU: torch takes five calls, each longer than the work
    values = logits.float().numpy()
    choice = int(values.argmax())
    return choice, float(1.0 / np.exp(values - values[choice]).sum())


def _spread(values: Tensor, d2t: Tensor, vocab_size: int, other: float) -> Tensor:
    """Values of the draft's tokens as values of the target's, ``other`` where the draft has none."""
    return values.new_full((vocab_size,), other).index_copy_(0, d2t, values)
