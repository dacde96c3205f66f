"""The loop that every recipe trains in, and what a step does with its loss; resumable to the same losses, bit for bit.

Knows modules, optimisers, checkpoints and the log. Does not know what is trained, or on what.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accel.distill.checkpoint import Checkpoints, Log
from accel.errors import ModelError

Row = dict[str, Any]


class Descending(Protocol):
    """What the loop asks of a recipe's training choices."""

    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def clip(self) -> float: ...


class Descent:
    """One training in one folder: ``module`` and ``optimizer`` stand where the last checkpoint left them.

    ``schedule`` is what the run was asked to do: a run that was killed goes on only with the same.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, schedule: Mapping[str, Any]
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._checkpoints = Checkpoints(folder, schedule)
        self._done = self._checkpoints.load(module, optimizer)
        self._log = Log(folder, self._done)

    def run(
        self,
        how: Descending,
        step: Callable[[int], Row],
        progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
    ) -> list[Row]:
        """Take the steps that are left; all rows of the log: step, what ``step(number)`` told, seconds."""
        for number in range(self._done, how.steps):
            started = time.perf_counter()
            row = step(number)
            self._log.add({"step": number, **row, "seconds": round(time.perf_counter() - started, 4)})
            if (number + 1) % how.checkpoint_every == 0 or number + 1 == how.steps:
                self._checkpoints.save(number + 1, self._module, self._optimizer)
            progress(self._log.rows[-1])
        return self._log.rows


def update(
    optimizer: torch.optim.Optimizer,
    weights: Iterable[nn.Parameter],
    loss: Tensor | Iterable[Tensor],
    how: Descending,
    rate: float,
    step: int,
) -> Row:
    """One step down ``loss`` at learning rate ``rate``: loss, learning_rate, norm (the gradient's, before clipping).

    ``loss`` may come as its summands: one's graph is gone before the next is asked for. ModelError where the loss is
    not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    for part in (loss,) if isinstance(loss, Tensor) else loss:
        value += float(part.detach())
        if not math.isfinite(value):
            raise ModelError(f"step {step}: the loss is {value}; lower the learning rate (it is {how.learning_rate})")
        part.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(weights), how.clip)
    optimizer.step()
    return {"loss": value, "learning_rate": rate, "norm": float(norm)}


@contextmanager
def alone(weights: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Gradients for ``weights`` and for nothing else that ``model`` has; afterwards what wanted them before does."""
    learned = list(weights)
    before = [(each, each.requires_grad) for each in (*model.parameters(), *learned)]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        for weight in learned:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)
