"""What one target step costs by the number of positions it reads: the ground every speculative gain stands on.

Measured through the public surface: a drafter whose guesses are always wrong makes every round verify exactly n
positions and gain one token, so that a round's time is the cost of n positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import accel
from accel.bench import environment

POSITIONS = (1, 2, 3, 5, 9, 17)
CONTEXT_TOKENS = 128
# steps timed in one run, and runs of each size, taken in turn
STEPS, RUNS = 10, 7


class WrongGuess:
    """Proposes the same unlikely token as often as it may."""

    name = "wrong-guess"
    free = True

    def __init__(self, token: int) -> None:
        self.token = token

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None: ...

    def propose(self, asks: Sequence[accel.Ask]) -> list[accel.Draft]:
        return [accel.Draft([self.token] * ask.max_tokens, None, [0.5] * ask.max_tokens, self.name) for ask in asks]

    def observe(self, row: int, tokens: Sequence[int]) -> None: ...

    def close(self, row: int) -> None: ...

    def state_bytes(self) -> int:
        return 0


@dataclass
class _StopAfter(StoppingCriteria):
    """Ends a run while there is still room for full drafts."""

    length: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def measure(model: Any, positions: Sequence[int] = POSITIONS) -> dict[str, Any]:
    """Seconds of a step over n positions and their ratio to one position's, paired run by run; a JSON document."""
    seconds: dict[int, list[float]] = {n: [] for n in positions}
    for run in range(RUNS + 1):
        for n in positions:
            taken = _seconds_per_step(model, n)
            if run:  # the first round warms caches up
                seconds[n].append(taken)
    one = np.array(seconds[positions[0]])
    rows = {}
    for n, values in seconds.items():
        ratios = np.array(values) / one
        rows[str(n)] = {
            "median_step_ms": 1000 * median(values),
            "ratio": float(np.median(ratios)),
            "ratio_p20": float(np.percentile(ratios, 20)),
            "ratio_p80": float(np.percentile(ratios, 80)),
        }
    return {"positions": rows, "context_tokens": CONTEXT_TOKENS, "environment": environment.describe(model.device)}


def terminal(document: dict[str, Any]) -> str:
    """The document as a table."""
    lines = [f"{'positions':>9}  {'ms a step':>9}  {'ratio to one':>12}  {'p20 – p80':>13}"]
    for n, row in document["positions"].items():
        spread = f"{row['ratio_p20']:.2f} – {row['ratio_p80']:.2f}"
        lines.append(f"{n:>9}  {row['median_step_ms']:9.1f}  {row['ratio']:12.2f}  {spread:>13}")
    return "\n".join(lines) + "\n"


def _seconds_per_step(model: Any, n: int) -> float:
    ids = torch.arange(CONTEXT_TOKENS, device=model.device)[None] % model.config.vocab_size
    if n == 1:
        accel.attach(model, method="plain")
    else:
        accel.attach(model, WrongGuess(model.config.vocab_size - 1), drafter="lm", draft_length=n - 1)
    try:
        stop = StoppingCriteriaList([_StopAfter(CONTEXT_TOKENS + STEPS)])
        pad = {"pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, max_new_tokens=4 * max(POSITIONS), do_sample=False, stopping_criteria=stop, **pad)
        stats = accel.stats(model)
    finally:
        accel.detach(model)
    return (stats.seconds["decode"] if n == 1 else stats.seconds["verify"]) / stats.target_calls
