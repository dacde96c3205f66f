"""Learning rates over a run. Knows steps and shares alone."""

from __future__ import annotations

import math


def warm_cosine(step: int, steps: int, warmup: float, floor: float) -> float:
    """The share of the peak rate at ``step`` of ``steps``: up linearly, then down along a cosine.

    ``warmup``: share of the steps that it rises; ``floor``: share of the peak that is left at the end.
    """
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    late = (step - rising) / max(steps - rising, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late))
