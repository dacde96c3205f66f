"""Prometheus metrics of a server: vLLM's names where the meaning is the same, ``accel:`` for the rest.

Knows what is counted and what it is called. What the engine counts is read from it when somebody asks, and nothing is
counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from accel.engine.service import Service

# vLLM's buckets, so that a panel made for it shows the same quantiles here
FROM_TEN = (10, 20, 40, 80, 160, 640, 2560)
TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, *FROM_TEN)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
OF_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# of vLLM's request_success: a series that appears with its first request has no rate at that moment
FINISHES = ("stop", "length", "abort", "error")
# of cascades: whose word it was; nobody's; and requests that nobody waited for
DECISIONS = ("agreed", "escalated", "fallback", "failed", "abandoned")
KINDS = ("rows", "prefixes", "cartridges")

# vLLM's labels; there is one engine
LABELS = ("model_name", "engine")
ENGINE = "0"


class Metrics:
    """What one server exports about one model. Safe to call from any thread."""

    def __init__(self, model_name: str, service: Service) -> None:
        self._labels = (model_name, ENGINE)
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(self._labels, service))
        # resident memory, open files and processor time of this process, under the names that every client uses
        ProcessCollector(registry=self._registry)
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token.", TO_FIRST)
        self._gaps = self._histogram("vllm:inter_token_latency_seconds", "Time between two outputs.", PER_TOKEN)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", PER_TOKEN
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", OF_REQUEST)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Time spent waiting.", OF_REQUEST)
        self._read = self._histogram("vllm:request_prompt_tokens", "Tokens of the prompt.", TOKENS)
        self._written = self._histogram("vllm:request_generation_tokens", "Generated tokens.", TOKENS)
        self._finished = self._counter("vllm:request_success", "Finished requests.", "finished_reason", FINISHES)
        self._asked = self._counter("accel:cascade_requests", "Answers of cascades.", "decision", DECISIONS)
        self._cost = self._counter("accel:cascade_cost_dollars", "What cascades have cost, as far as prices are known.")
        self._alone = self._counter(
            "accel:cascade_teacher_only_dollars", "What the teachers alone would have cost for the same answers."
        )
        self._unpriced = self._counter("accel:cascade_unpriced_requests", "Answers whose cost is not known.")

    def observe(
        self,
        *,
        prompt_tokens: int,
        generated_tokens: int,
        finish: str,
        ttft: float | None,
        inter_token: Sequence[float],
        e2e: float,
        queue: float | None,
    ) -> None:
        """A finished request, times in seconds. ``inter_token``: between outputs, each of one token or several."""
        # "tool_calls" and the like are what a stop is called in an answer
        self._finished.labels(*self._labels, finish if finish in FINISHES else "stop").inc()
        self._read.observe(prompt_tokens)
        self._written.observe(generated_tokens)
        self._e2e.observe(e2e)
        if queue is not None:
            self._queue.observe(queue)
        if ttft is None:
            return
        self._ttft.observe(ttft)
        for gap in inter_token:
            self._gaps.observe(gap)
        if generated_tokens > 1:
            self._tpot.observe((e2e - ttft) / (generated_tokens - 1))

    def observe_cascade(self, *, decision: str, cost: float | None, saved: float | None) -> None:
        """An answer of a cascade, in dollars; None where a price is not known, and ``saved`` may be negative."""
        self._asked.labels(*self._labels, decision).inc()
        if cost is None:
            self._unpriced.labels(*self._labels).inc()
            return
        self._cost.labels(*self._labels).inc(cost)
        if saved is not None:
            self._alone.labels(*self._labels).inc(max(0.0, cost + saved))

    def render(self) -> tuple[bytes, str]:
        """The page for a scrape, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, registry=self._registry, buckets=buckets).labels(*self._labels)

    def _counter(self, name: str, text: str, label: str | None = None, values: Sequence[str] = ()) -> Counter:
        made = Counter(name, text, LABELS if label is None else (*LABELS, label), registry=self._registry)
        if label is None:
            made.labels(*self._labels)
        for value in values:
            made.labels(*self._labels, value)
        return made


class _OfEngine(Collector):
    """Gauges and sums that the engine keeps itself."""

    def __init__(self, labels: tuple[str, str], service: Service) -> None:
        self._labels = labels
        self._service = service

    def describe(self) -> list[Metric]:
        # asked at registration, when there is nothing to describe yet
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._service.gauges()
        yield self._gauge("vllm:num_requests_running", "Continuations in the engine's batch.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Continuations waiting for a place in it.", now.waiting)
        yield self._sum("vllm:prompt_tokens", "Tokens of prompts.", now.prompt_tokens)
        yield self._sum("vllm:generation_tokens", "Generated tokens.", now.generated_tokens)
        yield self._sum("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.", now.prompt_tokens)
        yield self._sum("vllm:prefix_cache_hits", "Of these, not read again.", now.cached_tokens)
        yield self._sum("vllm:spec_decode_num_drafts", "Drafts that were verified.", now.drafts)
        yield self._sum("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", now.drafted_tokens)
        yield self._sum("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were kept.", now.accepted_tokens)
        by_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were kept, by their place in the draft.",
            labels=(*LABELS, "position"),
        )
        for position, kept in enumerate(now.accepted_by_position):
            by_position.add_metric((*self._labels, str(position)), kept)
        yield by_position
        context = GaugeMetricFamily("accel:context_bytes", "Bytes of keys and values.", labels=(*LABELS, "kind"))
        for kind in dict.fromkeys((*KINDS, *now.context_bytes)):
            context.add_metric((*self._labels, kind), now.context_bytes.get(kind, 0))
        yield context
        yield self._gauge("accel:cartridges_loaded", "Cartridges in memory.", len(now.cartridges))
        alive = self._service.failure is None
        yield self._gauge("accel:engine_alive", "1 while the engine lives.", int(alive))

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _sum(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family
