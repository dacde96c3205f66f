"""A row's draft while it grows, for drafters whose models say more than one token. Knows logits, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from accel.drafters.base import Ask, Beside, Draft
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
    beside: list[Beside] = field(default_factory=list)

    def take(self, logits: Tensor, target_ids: Sequence[int] | None) -> None:
        """The likeliest token by logits over the draft's vocabulary ``[V]``, and as many others as the ask has use for.

        ``target_ids``: the target ids of that vocabulary, None where it is the target's own.
        """
        found = likeliest(logits, 1 + self.ask.beside)
        known = found if target_ids is None else [(target_ids[choice], chance) for choice, chance in found]
        depth = len(self.tokens)
        self.tokens.append(known[0][0])
        self.confidence.append(known[0][1])
        self.beside += [Beside(depth, token, chance) for token, chance in known[1:]]

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
        return Draft(self.tokens, probs, self.confidence, source, self.beside)


def likeliest(logits: Tensor, count: int = 1) -> list[tuple[int, float]]:
    """The ``count`` likeliest tokens of logits ``[V]`` with their probabilities, likeliest first."""
    if logits.device.type != "cpu":
        best = logits.float().softmax(-1).topk(min(count, len(logits)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    # numpy on a CPU: torch takes five calls, each longer than the work
    values = logits.float().numpy()
    first = int(values.argmax())
    weights = np.exp(values - values[first])
    total = float(weights.sum())
    found = [(first, 1.0 / total)]
    # as many as are of use, one by one: a few more looks at a small vocabulary are less than sorting it
    for _ in range(min(count, len(values)) - 1):
        weights[found[-1][0]] = -1.0
        choice = int(weights.argmax())
        found.append((choice, float(weights[choice]) / total))
    return found


def _spread(values: Tensor, d2t: Tensor, vocab_size: int, other: float) -> Tensor:
    """Values of the draft's tokens as values of the target's, ``other`` where the draft has none."""
    return values.new_full((vocab_size,), other).index_copy_(0, d2t, values)
