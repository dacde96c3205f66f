"""Outcomes → the flat figures of `vllm bench serve`, by its definitions and under its names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from accel.bench.serving.stream import Outcome
from accel.errors import OptionError

GOODPUT = ("ttft", "tpot", "e2el")
MOST_ERRORS = 5


def parse_goodput(texts: Iterable[str]) -> dict[str, float]:
    """``["ttft:500,e2el:3000"]`` → ``{"ttft": 500.0, "e2el": 3000.0}``, in milliseconds."""
    found: dict[str, float] = {}
    for part in ",".join(texts).replace(" ", ",").split(","):
        if not part:
            continue
        name, _, text = part.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in GOODPUT or not limit >= 0:
            raise OptionError(f"--goodput {part}: write NAME:MILLISECONDS with {', '.join(GOODPUT)}, as in ttft:500")
        found[name] = limit
    return found


def tpot(outcome: Outcome) -> float:
    """Seconds a token behind the first; 0 for an answer of one token, which has none."""
    if outcome.output_tokens <= 1:
        return 0.0
    return (outcome.latency - outcome.ttft) / (outcome.output_tokens - 1)


def figures(outcomes: Sequence[Outcome], duration: float, goodput: Mapping[str, float]) -> dict[str, Any]:
    """What came of a run of ``duration`` seconds. Failed requests count as failed and in nothing else."""
    good = [each for each in outcomes if each.error is None]
    read, written = sum(each.prompt_tokens for each in good), sum(each.output_tokens for each in good)
    most_tokens, most_requests = peaks(good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_meets(each, goodput) for each in good) / duration if goodput else None,
        "output_throughput": written / duration,
        "total_token_throughput": (read + written) / duration,
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_requests,
    }
    seconds = {
        "ttft": [each.ttft for each in good],
        "tpot": [tpot(each) for each in good if each.output_tokens > 1],
        "itl": [gap for each in good for gap in each.gaps],
        "e2el": [each.latency for each in good],
        # not of vLLM: some servers open with a chunk that has no text, long before the first token
        "ttft_text": [each.ttft_text for each in good if each.ttft_text is not None],
    }
    for name, values in seconds.items():
        found |= spread(name, values)
    return found


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """``{mean,median,std,p99}_NAME_ms``; zeros of nothing, as vLLM has it."""
    values = np.asarray(seconds or [0.0]) * 1000
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }


def _meets(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    reached = {"ttft": outcome.ttft, "tpot": tpot(outcome), "e2el": outcome.latency}
    return all(reached[name] * 1000 <= limit for name, limit in goodput.items())


def peaks(good: Sequence[Outcome]) -> tuple[float, int]:
    """The most chunks and the most requests under way in any one second from the first request on."""
    if not good:
        return 0.0, 0
    first = min(each.started for each in good)
    chunks: Counter[int] = Counter()
    running: Counter[int] = Counter()
    for each in good:
        at = each.started - first
        chunks.update(int(moment) for moment in np.cumsum([at + each.ttft, *each.gaps]))
        running.update(range(int(at), int(at + each.latency) + 1))
    return float(max(chunks.values())), max(running.values())


def errors(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """What failures said, the most frequent first, each with how often."""
    counted = Counter(each.error for each in outcomes if each.error is not None)
    return [{"error": text, "count": count} for text, count in counted.most_common(MOST_ERRORS)]


def detailed(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """Every request under the keys of `--save-detailed`, in the order in which they arrived."""
    return {
        "input_lens": [each.prompt_tokens for each in outcomes],
        "output_lens": [0 if each.error is not None else each.output_tokens for each in outcomes],
        "ttfts": [each.ttft for each in outcomes],
        "itls": [each.gaps for each in outcomes],
        "latencies": [each.latency for each in outcomes],
        "start_times": [each.started for each in outcomes],
        "queue_times": [each.queued for each in outcomes],
        "generated_texts": [each.text for each in outcomes],
        "finish_reasons": [each.finish_reason for each in outcomes],
        "errors": [each.error or "" for each in outcomes],
    }
