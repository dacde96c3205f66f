"""Times of callables on one device: cold caches, interleaved runs, medians and their spread.

On CUDA the time between two events around the call. Before each call a buffer larger than the L2 is written and read
again: that leaves the cache full of clean lines that nobody wants (dirty ones would be written back on the next
kernel's time), and keeps the GPU busy while the host queues the call, so that the time is the device's alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from accel.bench.kernels.cases import Thunk

# on CUDA this or five times the L2, whichever is more; on a CPU more than most L2 caches
FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
LEAST, MOST = 5, 100

Mark = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """Milliseconds of every repetition, in order; ``host_ms``: what one call takes the host to queue."""

    ms: Sequence[float]
    host_ms: float | None = None

    @property
    def median(self) -> float:
        return median(self.ms)

    def figures(self) -> dict[str, float]:
        return {
            "median_ms": self.median,
            "p20_ms": float(np.percentile(self.ms, 20)),
            "p80_ms": float(np.percentile(self.ms, 80)),
        }

    def ratio_to(self, ours: Times) -> dict[str, float]:
        """How many times as long this takes as ``ours``, paired repetition by repetition."""
        ratios = np.array(self.ms) / np.maximum(np.array(ours.ms), 1e-9)
        return {
            "ratio": float(np.median(ratios)),
            "ratio_p20": float(np.percentile(ratios, 20)),
            "ratio_p80": float(np.percentile(ratios, 80)),
        }


class Clock:
    """Times on ``device``, at most about ``seconds`` a contestant."""

    def __init__(self, device: torch.device, seconds: float, flush_bytes: int | None = None) -> None:
        self.device = device
        self.seconds = seconds
        self.on_gpu = device.type == "cuda"
        if flush_bytes is None:
            flush_bytes = FLUSH_BYTES["cuda" if self.on_gpu else "cpu"]
            if self.on_gpu:
                # not every build of torch says how large it is
                cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
                flush_bytes = max(flush_bytes, 5 * cache)
        self.flush_bytes = flush_bytes
        self._buffer = torch.empty(max(flush_bytes // 4, 1), dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self._flush()
        self.wait()
        started = time.perf_counter()
        self._flush()
        self.wait()
        self._flush_ms = 1000 * (time.perf_counter() - started)

    def wait(self) -> None:
        """Until the device has done everything asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def first_call(self, run: Thunk) -> tuple[float, Any]:
        """Seconds of a first call, compilation included, and its result; what it raises is the caller's to name."""
        started = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - started, result

    def race(self, runs: Mapping[str, Thunk]) -> dict[str, Times]:
        """Times of each of ``runs``, taken in turns, another one first each time; all have been called before."""
        names = list(runs)
        host_ms = {name: self._host_ms(runs[name]) for name in names} if self.on_gpu else {}
        started = time.perf_counter()
        for name in names:
            self._once(runs[name], host_ms.get(name))
        self.wait()
        a_round = time.perf_counter() - started
        rounds = min(max(int(self.seconds * len(names) / max(a_round, 1e-6)), LEAST), MOST)
        marks: dict[str, list[Mark]] = {name: [] for name in names}
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                marks[name].append(self._once(runs[name], host_ms.get(name)))
        self.wait()
        return {name: Times([mark() for mark in marks[name]], host_ms.get(name)) for name in names}

    def _once(self, run: Thunk, host_ms: float | None) -> Mark:
        """Run it; what comes back tells its milliseconds once the device is done."""
        if not self.on_gpu:
            self._flush()
            started = time.perf_counter()
            run()
            taken = 1000 * (time.perf_counter() - started)
            return lambda: taken
        # enough work ahead that the host has queued the whole call before the device gets to it
        for _ in range(min(1 + math.ceil((host_ms or 0) / self._flush_ms), 50)):
            self._flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def _host_ms(self, run: Thunk) -> float:
        """The host's own time for one call: the least of three (a call that waits for the device shows it here)."""
        taken = []
        for _ in range(3):
            self.wait()
            started = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - started))
        self.wait()
        return min(taken)

    def _flush(self) -> None:
        self._buffer.fill_(1.0)
        if self.on_gpu:
            torch.sum(self._buffer, dim=0, out=self._sum)
