"""Micro-benchmarks of the Python that runs beside a measurement (pytest-benchmark; plain tests when it is disabled)."""

from __future__ import annotations

import numpy as np
import pytest

from accel.bench import metrics, saving, summary
from accel.bench.measure import Record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """240 prompts, six arms, 128 tokens: a whole Spec-Bench half."""
    rng = np.random.default_rng(0)
    found = []
    for prompt in range(240):
        for arm in range(6):
            times = np.cumsum(rng.uniform(0.02, 0.08, 128)).tolist()
            name = "transformers" if arm == 0 else f"arm-{arm}"
            record = Record(str(prompt), "qa", f"group {prompt % 6}", name, tokens=[1] * 128, times=times)
            record.seconds = times[-1] + 0.01
            record.verdict = "identical"
            found.append(record)
    return found


def build(records: list[Record]) -> dict:
    names = list(dict.fromkeys(record.arm for record in records))
    common = {"settings": {}, "environment": {}, "command": "", "date": "", "complete": False}
    return summary.document(records, names, "transformers", **common)


def test_paired_speedup(benchmark):
    ratios = np.random.default_rng(0).normal(1.4, 0.3, 240).tolist()
    assert 1.3 < benchmark(metrics.paired_speedup, ratios).median < 1.5


def test_document_of_a_long_run(benchmark, records):
    """Built again after every prompt, so it must cost little beside the minute a prompt takes."""
    document = benchmark(build, records)
    assert document["arms"]["arm-5"]["completed"] == 240


def test_dump_of_a_long_run(benchmark, records):
    document = build(records)
    assert len(benchmark(saving.dump, document)) > 1_000_000
