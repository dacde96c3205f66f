"""What both stages of training share: how steps are taken, and the loop around them.

Knows rows of tokens and a loss in parts. Does not know what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.distill.descent import Descent, Row, alone, update
from accel.distill.schedule import warm_cosine
from accel.errors import OptionError
from accel.methods.lawcat.distill.texts import Rows

# tokens whose activations are held at a time
AT_ONCE = 2048


@dataclass(frozen=True)
class Stage:
    """How one stage learns."""

    steps: int
    learning_rate: float
    batch_tokens: int = 4096
    # shares: of the steps that the rate rises, and of the rate that is left at the end of the cosine
    warmup: float = 0.05
    floor: float = 0.1
    clip: float = 1.0
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: must be a positive number")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be from 0 to 1")


def pieces(rows: Tensor) -> Iterator[Tensor]:
    """Rows [B, T], some at a time: at most ``AT_ONCE`` tokens, one row at least."""
    yield from rows.split(max(1, AT_ONCE // rows.shape[1]))


def descend(
    learner: nn.Module,
    model: nn.Module,
    rows: Rows,
    how: Stage,
    folder: Path,
    losses: Callable[[Tensor], Iterator[Tensor]],
    *,
    made_from: Mapping[str, Any],
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[Row]:
    """Train the parameters of ``learner`` in place, and none of ``model``'s own; a row a step, resumable.

    ``losses``: a batch [B, T] to the summands of its loss. ``made_from``: what must not have changed in a run that goes
    on.
    """
    weights = list(learner.parameters())
    optimizer = torch.optim.AdamW(weights, lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    descent = Descent(learner, optimizer, folder, asdict(how) | dict(made_from))
    batches = rows.batches(how.batch_tokens, how.seed)
    device = weights[0].device

    def step(number: int) -> Row:
        rate = how.learning_rate * warm_cosine(number, how.steps, how.warmup, how.floor)
        return update(optimizer, weights, losses(batches[number].to(device)), how, rate, number)

    with alone(weights, model):
        return descent.run(how, step, progress)
