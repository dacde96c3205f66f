"""What a scrape shows: vLLM's names and labels, the engine's own sums, nothing that vLLM's own parser trips over."""

from __future__ import annotations

import pytest
from fake_service import FakeService
from prometheus_client.parser import text_string_to_metric_families

from accel.engine.service import Gauges
from accel.server.metrics import Metrics

BUSY = Gauges(
    running=3,
    waiting=2,
    context_bytes={"rows": 1000, "prefixes": 500},
    cartridges=("handbook", "laws"),
    prompt_tokens=90,
    cached_tokens=40,
    generated_tokens=70,
    drafts=20,
    drafted_tokens=60,
    accepted_tokens=45,
    accepted_by_position=(20, 15, 10),
)


def scraped(metrics: Metrics) -> dict[str, float]:
    """``name`` or ``name/label value`` → value, of the labels beyond model and engine."""
    body, kind = metrics.render()
    assert kind.startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            extra = [value for label, value in sample.labels.items() if label not in ("model_name", "engine")]
            if sample.name.split(":")[0] in ("vllm", "accel"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
            found["/".join([sample.name, *extra])] = sample.value
    return found


def test_what_the_engine_counts_is_read_at_each_scrape() -> None:
    service = FakeService(Gauges())
    metrics = Metrics("tiny", service)
    assert scraped(metrics)["vllm:num_requests_running"] == 0
    service.now = BUSY
    found = scraped(metrics)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:prompt_tokens_total": 90,
        "vllm:generation_tokens_total": 70,
        "vllm:prefix_cache_queries_total": 90,
        "vllm:prefix_cache_hits_total": 40,
        "vllm:spec_decode_num_drafts_total": 20,
        "vllm:spec_decode_num_draft_tokens_total": 60,
        "vllm:spec_decode_num_accepted_tokens_total": 45,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total/0": 20,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total/1": 15,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total/2": 10,
        "accel:context_bytes/rows": 1000,
        "accel:context_bytes/prefixes": 500,
        "accel:context_bytes/cartridges": 0,
        "accel:cartridges_loaded": 2,
        "accel:engine_alive": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    service.failure = RuntimeError("out of memory")
    assert scraped(metrics)["accel:engine_alive"] == 0


def test_acceptance_is_what_vllms_benchmark_reads() -> None:
    """It adds up every line of a counter by the words in it, so that a counter's time of creation would count too."""
    service = FakeService(BUSY)
    body = Metrics("tiny", service).render()[0].decode()
    sums = {"num_drafts": 0.0, "num_draft_tokens": 0.0, "num_accepted_tokens_per_pos": 0.0, "num_accepted_tokens": 0.0}
    for line in body.splitlines():
        if line.startswith("vllm:spec_decode"):
            sums[next(word for word in sums if word in line)] += float(line.split()[-1])
    assert list(sums.values()) == [20, 60, 45, 45]


def test_requests_are_counted_by_their_end() -> None:
    metrics = Metrics("tiny", FakeService(Gauges()))
    assert scraped(metrics)["vllm:request_success_total/length"] == 0
    timed = {"ttft": 0.2, "inter_token": [0.05, 0.03, 0.02], "e2e": 1.1, "queue": 0.1}
    metrics.observe(prompt_tokens=12, generated_tokens=4, finish="length", **timed)
    metrics.observe(prompt_tokens=5, generated_tokens=0, finish="abort", ttft=None, inter_token=[], e2e=0.5, queue=None)
    metrics.observe(prompt_tokens=5, generated_tokens=1, finish="tool_calls", **timed | {"inter_token": []})
    found = scraped(metrics)
    ends = {end: found[f"vllm:request_success_total/{end}"] for end in ("stop", "length", "abort", "error")}
    assert ends == {"stop": 1, "length": 1, "abort": 1, "error": 0}
    counts = {
        "vllm:time_to_first_token_seconds": (2, 0.4),
        "vllm:inter_token_latency_seconds": (3, 0.1),
        # (1.1 - 0.2) over the three tokens after the first
        "vllm:request_time_per_output_token_seconds": (1, 0.3),
        "vllm:e2e_request_latency_seconds": (3, 2.7),
        "vllm:request_queue_time_seconds": (2, 0.2),
        "vllm:request_prompt_tokens": (3, 22),
        "vllm:request_generation_tokens": (3, 5),
    }
    for name, (count, total) in counts.items():
        assert found[f"{name}_count"] == count, name
        assert found[f"{name}_sum"] == pytest.approx(total), name
    assert found["vllm:time_to_first_token_seconds_bucket/0.1"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket/0.25"] == 2


def test_cascades_are_priced() -> None:
    metrics = Metrics("tiny", FakeService(Gauges()))
    metrics.observe_cascade(decision="agreed", cost=0.25, saved=0.5)
    # dearer than the teacher alone would have been
    metrics.observe_cascade(decision="escalated", cost=1.0, saved=-0.25)
    metrics.observe_cascade(decision="agreed", cost=None, saved=None)
    found = scraped(metrics)
    assert found["accel:cascade_requests_total/agreed"] == 2
    assert found["accel:cascade_requests_total/escalated"] == 1
    assert found["accel:cascade_cost_dollars_total"] == 1.25
    assert found["accel:cascade_teacher_only_dollars_total"] == 1.5
    assert found["accel:cascade_unpriced_requests_total"] == 1


def test_two_servers_in_a_process_do_not_mix() -> None:
    one, two = Metrics("tiny", FakeService(BUSY)), Metrics("tiny", FakeService(Gauges()))
    assert scraped(one)["vllm:num_requests_running"] == 3
    assert scraped(two)["vllm:num_requests_running"] == 0
