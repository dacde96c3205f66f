"""Micro-benchmarks of the Python that runs beside a measurement (pytest-benchmark; plain tests when it is disabled)."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from accel.bench import metrics, saving, summary
from accel.bench.measure import Record
from accel.methods.cascade.store.search import Column, Fields


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


def test_retrieval_from_a_hundred_thousand_demonstrations(benchmark):
    """Six of 10⁵ by goal and observation, vectors of a sentence model's size around 500 centres: the search of a store,
    without the reading of what it finds. Exact search in fp64 finds the same."""
    count, size, k = 100_000, 384, 6
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, size, generator=generator)

    def near(centre: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(centre + 0.5 * torch.randn(centre.shape, generator=generator), dim=-1)

    which = torch.randint(500, (count,), generator=generator)
    columns = {name: Column(size) for name in ("goal", "observation")}
    for column in columns.values():
        column.append(near(centres[which]).half())
    fields = Fields({name: each.view() for name, each in columns.items()}, dict.fromkeys(columns, torch.arange(count)))
    allowed = torch.ones(count, dtype=torch.bool)

    def search(queries: dict[str, torch.Tensor]) -> list[int]:
        return [window for window, _ in islice(fields.ranked(queries, allowed), k)]

    asked = [{name: near(centres[number]) for name in columns} for number in range(20)]
    benchmark(search, asked[0])
    found = 0
    for queries in asked:
        scores = sum(fields.columns[name].exact.double() @ query.double() for name, query in queries.items())
        found += len(set(search(queries)) & set(scores.topk(k).indices.tolist()))
    assert found / (k * len(asked)) >= 0.99
