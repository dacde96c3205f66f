"""The arithmetic of a benchmark, as pure functions of numbers. Knows nothing of models, arms or files.

Names and formulas of latencies follow ``vllm bench serve``: TTFT, TPOT (which excludes the first token), ITL (every
gap between two chunks, pooled over requests) and E2EL. Other tools use the same names for other quantities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import median

import numpy as np

# a fixed seed, so that the same measurements always give the same interval
BOOTSTRAP_SEED = 0
BOOTSTRAP_SAMPLES = 2000
# of a normal distribution: 95 % lie within this many standard deviations
Z95 = 1.96


def tpot_ms(latency: float, ttft: float, output_tokens: int) -> float | None:
    """Time per output token after the first, in ms; None for one token or less, where there is none."""
    return 1e3 * (latency - ttft) / (output_tokens - 1) if output_tokens > 1 else None


def itl_ms(chunk_times: Sequence[float]) -> list[float]:
    """Gaps between neighbouring chunks, in ms; a chunk is what the streamer receives at once."""
    return [1e3 * (after - before) for before, after in pairwise(chunk_times)]


def output_throughput(output_tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """All output tokens over all time, in tokens/s."""
    return sum(output_tokens) / sum(seconds) if sum(seconds) > 0 else 0.0


def describe(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """Mean, median, std and p99 under flat keys such as ``p99_ttft_ms``; None where there is no value."""
    array = np.asarray(list(values), dtype=float)
    if not array.size:
        return {f"{statistic}_{name}": None for statistic in ("mean", "median", "std", "p99")}
    return {
        f"mean_{name}": float(array.mean()),
        f"median_{name}": float(np.median(array)),
        f"std_{name}": float(array.std()),
        f"p99_{name}": float(np.percentile(array, 99)),
    }


@dataclass(frozen=True)
class Speedup:
    """How many times faster: the median of paired ratios over prompts, with two kinds of spread.

    ``p20`` and ``p80`` say how much prompts differ; ``low`` and ``high`` are a bootstrap 95 % interval of the median,
    which says how well these prompts determine it.
    """

    median: float
    p20: float
    p80: float
    low: float
    high: float
    prompts: int


def paired_speedup(ratios: Sequence[float]) -> Speedup | None:
    """Summarise one ratio a prompt; None without prompts."""
    if not ratios:
        return None
    array = np.asarray(ratios, dtype=float)
    p20, p80 = np.percentile(array, [20, 80])
    low, high = np.percentile(np.median(_drawn_again(array), axis=1), [2.5, 97.5])
    return Speedup(float(np.median(array)), float(p20), float(p80), float(low), float(high), array.size)


@dataclass(frozen=True)
class Difference:
    """A mean over prompts, and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float


def paired(reference: Sequence[float], mine: Sequence[float]) -> list[float]:
    """How many times as fast: median, least and most of the ratios of runs made side by side."""
    ratios = [a / b for a, b in zip(reference, mine, strict=True)]
    return [median(ratios), min(ratios), max(ratios)]


def paired_difference(mine: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How much more ``mine`` are than ``theirs``, prompt by prompt: prompts are drawn again, pairs stay together."""
    array = np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)
    low, high = np.percentile(_drawn_again(array).mean(axis=1), [2.5, 97.5])
    return Difference(float(array.mean()), float(low), float(high))


def _drawn_again(array: np.ndarray) -> np.ndarray:
    """[N] → [samples, N]: as many of the values, with replacement."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, array.size, (BOOTSTRAP_SAMPLES, array.size))
    found: np.ndarray = array[draws]
    return found


def paired_ratio(reference: Sequence[tuple[int, float]], arm: Sequence[tuple[int, float]]) -> float | None:
    """One prompt's ratio of tokens/s, arm over reference: the median over repetitions run side by side.

    Both are (output tokens, seconds) a repetition. Time is compared per token because outputs that differ within
    numerical noise, or are sampled, may end at different lengths.
    """
    ratios = [
        (arm_tokens / arm_seconds) / (tokens / seconds)
        for (tokens, seconds), (arm_tokens, arm_seconds) in zip(reference, arm, strict=False)
        if tokens and arm_tokens
    ]
    return float(np.median(ratios)) if ratios else None


def speedup_of_means(reference: Sequence[float], arm: Sequence[float]) -> float | None:
    """Spec-Bench's own figure: the mean over prompts of tokens/s, over the same mean of the reference."""
    if not reference or not arm:
        return None
    return float(np.mean(arm) / np.mean(reference))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; unlike the normal one it stays within 0 to 1 and has a width at its ends.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n), z = 1.96 (Wilson 1927).
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} successes in {trials} trials: there is no such share")
    p, z2n = successes / trials, Z95**2 / trials
    half = Z95 * sqrt(p * (1 - p) / trials + z2n / (4 * trials))
    return max(0.0, (p + z2n / 2 - half) / (1 + z2n)), min(1.0, (p + z2n / 2 + half) / (1 + z2n))


@dataclass(frozen=True)
class Drafting:
    """What drafting brought, pooled over runs; None where nothing says.

    ``tau``: tokens a row gains from one target call. ``acceptance``: accepted over drafted tokens. ``gamma``: mean
    drafted tokens a round. ``c``: time of drafting one token over that of one target step. ``predicted``: the
    speed-up over plain decoding that tau/(c·gamma + 1) promises (Leviathan et al. 2023); it counts a verification as
    one target step, so it is an upper estimate where checking several positions costs more than one.
    """

    tau: float | None = None
    acceptance: float | None = None
    gamma: float | None = None
    c: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class DraftCounts:
    """One run's counts, from its Stats."""

    row_calls: int
    drafted: int
    accepted: int
    cost_ratio: float | None


def drafting(runs: Sequence[DraftCounts]) -> Drafting:
    """Pool runs: counts are added, and c is averaged with the drafted tokens as weights."""
    calls = sum(run.row_calls for run in runs)
    drafted = sum(run.drafted for run in runs)
    accepted = sum(run.accepted for run in runs)
    if not calls:
        return Drafting()
    tau = 1 + accepted / calls
    if not drafted:
        return Drafting(tau=tau, gamma=0.0)
    gamma = drafted / calls
    costed = [(run.cost_ratio, run.drafted) for run in runs if run.cost_ratio is not None and run.drafted]
    weight = sum(tokens for _, tokens in costed)
    c = sum(cost * tokens for cost, tokens in costed) / weight if weight else None
    predicted = None if c is None else tau / (c * gamma + 1)
    return Drafting(tau, accepted / drafted, gamma, c, predicted)
