"""The search against every score computed in fp64, at sizes where a scan in 8 bits could go wrong."""

from __future__ import annotations

import statistics
import time
from itertools import islice

import pytest
import torch

from accel.methods.cascade.store import search
from accel.methods.cascade.store.search import Column, Fields, Table

NAMES = ("goal", "plan", "observation")


def unit(shape, generator, spread=0.0):
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator) + spread, dim=-1)


def made(windows, size=48, texts=None, seed=0, spread=0.0):
    """Columns with fewer texts than windows, some windows without one."""
    generator = torch.Generator().manual_seed(seed)
    texts = texts or max(1, windows // 2)
    columns, rows, exact = {}, {}, {}
    for name in NAMES:
        vectors = unit((texts, size), generator, spread).half()
        column = Column(size)
        # grown in pieces, as a store that others add to
        for piece in vectors.split(max(1, texts // 3)):
            column.append(piece)
        columns[name], exact[name] = column.view(), vectors.double()
        rows[name] = torch.randint(-1, texts, (windows,), generator=generator)
    return Fields(columns, rows), exact, unit((len(NAMES), size), generator, spread)


def brute(fields, exact, queries, allowed):
    """(window, score), best first, from the definition."""
    scores = torch.zeros(len(allowed), dtype=torch.float64)
    for name, query in queries.items():
        padded = torch.cat([exact[name] @ query.double(), torch.zeros(1).double()])
        scores += padded[fields.rows[name]]
    scores = (scores / len(queries)).masked_fill(~allowed, -torch.inf)
    order = torch.argsort(scores, descending=True, stable=True)
    return [(int(w), float(scores[w])) for w in order if scores[w] > -torch.inf]


# the table's queries are rounded to its fp16
@pytest.mark.parametrize(("how", "tolerance"), [("fields", 2e-6), ("table", 5e-4)])
@pytest.mark.parametrize(("windows", "spread"), [(1, 0), (7, 0), (65, 0), (600, 0), (3000, 0), (3000, 2.0)])
def test_the_order_is_that_of_the_definition(how, tolerance, windows, spread):
    fields, exact, vectors = made(windows, spread=spread)
    allowed = torch.ones(windows, dtype=torch.bool)
    allowed[::5] = windows == 1
    for asked in (NAMES, NAMES[:1], NAMES[1:]):
        queries = dict(zip(NAMES, vectors, strict=True))
        queries = {name: queries[name] for name in asked}
        searched = fields if how == "fields" else Table(fields, NAMES, torch.device("cpu"))
        found = list(islice(searched.ranked(queries, allowed), 100))
        expected = brute(fields, exact, queries, allowed)
        assert len(found) == min(100, len(expected)) and len({w for w, _ in found}) == len(found)
        scores = dict(expected)
        for (window, score), (_, best) in zip(found, expected, strict=False):
            # the scores are in order, and each is its window's own; equal ones may change places
            assert abs(score - scores[window]) < tolerance and abs(score - best) < tolerance


def test_every_allowed_window_comes_once_and_no_other():
    fields, exact, vectors = made(2000)
    allowed = torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.7
    queries = dict(zip(NAMES, vectors, strict=True))
    found = [window for window, _ in fields.ranked(queries, allowed)]
    assert sorted(found) == torch.nonzero(allowed)[:, 0].tolist()
    assert found[:50] == [window for window, _ in brute(fields, exact, queries, allowed)[:50]]
    assert not list(fields.ranked(queries, torch.zeros(2000, dtype=torch.bool)))


def test_ties_beyond_what_is_settled_are_still_handed_out():
    # more windows with one and the same score than are ever settled at a time
    windows = search.SETTLE_MOST + 500
    fields, _, vectors = made(windows, texts=1)
    fields = Fields(fields.columns, {name: torch.zeros(windows, dtype=torch.long) for name in NAMES})
    queries = dict(zip(NAMES, vectors, strict=True))
    found = [window for window, _ in fields.ranked(queries, torch.ones(windows, dtype=torch.bool))]
    assert sorted(found) == list(range(windows))


def test_what_the_scan_gets_wrong_is_put_right(monkeypatch):
    fields, exact, vectors = made(3000)
    queries = dict(zip(NAMES, vectors, strict=True))
    allowed = torch.ones(3000, dtype=torch.bool)
    scan, noise = search.ColumnView.scan, torch.Generator().manual_seed(2)

    def worse(self, query):
        scores = scan(self, query)
        return scores + 0.2 * torch.randn(scores.shape, generator=noise)

    monkeypatch.setattr(search.ColumnView, "scan", worse)
    found = [window for window, _ in islice(fields.ranked(queries, allowed), 20)]
    assert found == [window for window, _ in brute(fields, exact, queries, allowed)[:20]]


def test_without_the_8_bit_product_fp16_does(monkeypatch):
    fields, exact, vectors = made(700)
    queries = dict(zip(NAMES, vectors, strict=True))
    allowed = torch.ones(700, dtype=torch.bool)
    assert search._scans_in_8_bits(), "torch has lost the product: scans are slower now"
    monkeypatch.setattr(search, "_scans_in_8_bits", lambda: False)
    found = [window for window, _ in islice(fields.ranked(queries, allowed), 20)]
    assert found == [window for window, _ in brute(fields, exact, queries, allowed)[:20]]


def test_a_view_stays_while_its_column_grows():
    column, generator = Column(16), torch.Generator().manual_seed(0)
    column.append(unit((3, 16), generator).half())
    view = column.view()
    before = view.exact.clone()
    for _ in range(10):
        column.append(unit((50, 16), generator).half())
    assert len(column) == 503 and torch.equal(view.exact, before)
    assert torch.equal(column.view().exact[:3], before)


@pytest.mark.slow
def test_recall_and_time_of_a_hundred_thousand(record_property):
    """Every window with texts of its own: the most that a scan of 10^5 can cost. The time is recorded, not judged."""
    fields, _, _ = made(100_000, size=384, texts=100_000)
    fields = Fields(fields.columns, {name: torch.arange(100_000) for name in NAMES})
    allowed = torch.ones(100_000, dtype=torch.bool)
    asked = unit((10, 3, 384), torch.Generator().manual_seed(3))
    columns = (fields.columns[name].exact.float() @ asked[:, number].T for number, name in enumerate(NAMES))
    scores = sum(columns, torch.zeros(100_000, 10))
    hits, seconds, cpu_seconds = 0, [], []
    for exact, vectors in zip(scores.T, asked, strict=True):
        queries = dict(zip(NAMES, vectors, strict=True))
        wall, cpu = time.perf_counter(), time.process_time()
        found = {window for window, _ in islice(fields.ranked(queries, allowed), 6)}
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
        hits += len(found & set(exact.topk(6).indices.tolist()))
    record_property("milliseconds", 1e3 * statistics.median(seconds))
    record_property("cpu_milliseconds", 1e3 * statistics.median(cpu_seconds))
    record_property("recall", hits / 60)
    assert hits / 60 >= 0.99
