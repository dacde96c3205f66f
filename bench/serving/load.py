"""When requests are sent: arrivals as `vllm bench serve` draws them, and a limit of how many are under way at once."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from accel.bench.serving.stream import Outcome
from accel.errors import OptionError

Asked = Callable[[str], Awaitable[Outcome]]


def check_rate(rate: float, burstiness: float, max_concurrency: int | None) -> None:
    """Refuse what is no load."""
    if not rate > 0:
        raise OptionError(f"request_rate={rate:g}: must be more than 0 requests a second, or inf for all at once")
    if not burstiness > 0:
        raise OptionError(f"burstiness={burstiness:g}: must be more than 0; 1 is a Poisson process, inf an even beat")
    if max_concurrency is not None and max_concurrency < 1:
        raise OptionError(f"max_concurrency={max_concurrency}: must be at least 1")


def arrivals(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests arrive.

    Gaps are drawn from a gamma distribution of shape ``burstiness`` and mean 1 / ``rate`` (1: a Poisson process), then
    scaled so that the last request arrives at ``count`` / ``rate``: runs of different seeds offer the same load.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count, 1 / rate)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(each) for each in times]


async def drive(
    ask: Asked,
    prompts: Sequence[str],
    times: Sequence[float],
    max_concurrency: int | None = None,
    told: Callable[[Outcome], None] | None = None,
) -> tuple[list[Outcome], float]:
    """Every prompt, at its time or as soon after it as the limit allows; the outcomes, and the seconds they took."""
    slots = asyncio.Semaphore(max_concurrency or len(prompts))

    async def one(prompt: str) -> Outcome:
        arrived = time.perf_counter()
        async with slots:
            outcome = await ask(prompt)
        outcome.queued = outcome.started - arrived
        if told is not None:
            told(outcome)
        return outcome

    began = time.perf_counter()
    tasks = []
    try:
        for prompt, at in zip(prompts, times, strict=True):
            if (wait := began + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(prompt)))
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return list(outcomes), time.perf_counter() - began
