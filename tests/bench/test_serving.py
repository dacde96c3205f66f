"""Load on servers whose delays are known: the figures must say them; failures are counted, and nothing hangs."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from refusals import refusal
from scripted_server import END, EVENT_STREAM, ScriptedServer, answer, chunked, delta, event, plain, usage

from accel.bench.serving import client, figures, report, scrape, session
from accel.bench.serving.client import Ask
from accel.bench.serving.session import Plan, Target
from accel.bench.serving.stream import Outcome

FIRST, GAP, TOKENS = 0.1, 0.04, 6
# what a busy machine may add to a pause
SLACK = 60.0


def is_probe(body):
    return "hello" in json.dumps(body)


def steady(body):
    return answer(0.0, 0.0, 2) if is_probe(body) else answer(FIRST, GAP, TOKENS)


def run(*servers, **options):
    targets = [Target(f"s{index}", each if isinstance(each, str) else each.url) for index, each in enumerate(servers)]
    ask = Ask(**{name: options.pop(name) for name in list(options) if name in Ask.__dataclass_fields__})
    plan = Plan(targets, ask, ready_timeout=options.pop("ready_timeout", 10), **options)
    return session.carry_out(plan, lambda text: None)


def test_figures_are_the_delays_of_the_server():
    with ScriptedServer(steady) as server:
        found = run(server, num_prompts=4, max_concurrency=2, save_detailed=True, max_tokens=TOKENS, temperature=0.0)
    assert (found["completed"], found["failed"]) == (4, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (28, 24)
    whole = FIRST + (TOKENS - 1) * GAP
    for name, seconds in (("ttft", FIRST), ("itl", GAP), ("tpot", GAP), ("e2el", whole), ("ttft_text", FIRST)):
        assert 1000 * seconds - 2 <= found[f"median_{name}_ms"] <= 1000 * seconds + SLACK, name
        assert found[f"p99_{name}_ms"] >= found[f"median_{name}_ms"]
    assert 2 * whole <= found["duration"] <= 2 * whole + 1
    assert found["output_throughput"] == pytest.approx(24 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(52 / found["duration"])
    assert found["request_throughput"] == pytest.approx(4 / found["duration"])
    assert found["request_goodput"] is None
    assert server.most == 2
    assert found["model_id"] == "tiny" and found["backend"] == "openai-chat" and found["request_rate"] == "inf"
    assert found["output_lens"] == [TOKENS] * 4 and [len(each) for each in found["itls"]] == [TOKENS - 1] * 4
    assert found["generated_texts"][0] == "t0 t1 t2 t3 t4 t5 "
    body = server.bodies[-1]
    assert (body["max_completion_tokens"], body["temperature"], body["model"]) == (TOKENS, 0.0, "tiny")
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert "t0" not in report.terminal(found) and "4 answered, 0 failed" in report.terminal(found)


def test_figures_match_numpy_on_outcomes_that_are_known():
    good = [
        Outcome(0.0, 0.0, 0.5, 0.5, 2.5, [1.0, 1.0], 10, 5),
        Outcome(1.0, 0.0, 0.1, 0.1, 0.1, [], 4, 1),
        Outcome(2.5, 0.0, 1.0, 2.0, 3.0, [0.25, 0.75, 1.0], 6, 3),
    ]
    found = figures.figures([*good, Outcome(error="gone", prompt_tokens=99)], 10.0, {"ttft": 600, "tpot": 500})
    # one token has no time a token, and counts as 0 for goodput
    tpots = np.array([2.0 / 4, 2.0 / 2]) * 1000
    assert found["mean_tpot_ms"] == tpots.mean() and found["std_tpot_ms"] == tpots.std()
    assert found["p99_tpot_ms"] == np.percentile(tpots, 99)
    assert found["mean_itl_ms"] == pytest.approx(800.0) and found["median_itl_ms"] == 1000.0
    assert found["median_e2el_ms"] == 2500.0 and found["median_ttft_text_ms"] == 500.0
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (
        3,
        1,
        20,
        9,
    )
    assert found["request_goodput"] == 2 / 10
    # chunks at 0.5 1.5 2.5 | 1.1 | 3.5 3.75 4.5 5.5; running in seconds 0–2 | 1 | 2–5
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (2.0, 2)
    nothing = figures.figures([Outcome(error="gone")], 1.0, {})
    assert nothing["completed"] == 0 and nothing["mean_ttft_ms"] == 0.0 and nothing["output_throughput"] == 0.0


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "itl:5", "e2el:-1", "ttft:nan"])
def test_goodput_that_cannot_be_read(text):
    assert text in refusal(lambda: figures.parse_goodput([text]))


def test_goodput_counts_the_requests_that_keep_every_limit():
    assert figures.parse_goodput(["ttft:500,e2el:3000", "tpot:50"]) == {"ttft": 500, "e2el": 3000, "tpot": 50}

    def script(body):
        return answer(0.0, 0.0, 2) if is_probe(body) or "quick" not in json.dumps(body) else answer(0.5, 0.0, 2)

    with ScriptedServer(script) as server:
        found = run(server, num_prompts=3, goodput={"ttft": 400}, extra={"user": "quick"})
        assert found["request_goodput"] == 0.0
        found = run(server, num_prompts=3, goodput={"ttft": 400})
        assert found["request_goodput"] == pytest.approx(3 / found["duration"])


BAD = {
    "a refusal": ([plain(400, {"error": {"message": "too long"}})], "status 400: too long"),
    "a full queue": ([plain(429, {"detail": "full"})], "status 429: full"),
    "an error event": ([EVENT_STREAM, delta("a"), event({"error": {"message": "broke"}}), END], "reported: broke"),
    "an early close": ([EVENT_STREAM, delta("a"), None], "RemoteProtocolError"),
    "an early end": ([EVENT_STREAM, delta("a"), END], "neither a finish_reason nor"),
    "no chunk": ([EVENT_STREAM, END], "without a chunk"),
    "no stream": ([plain(200, {"choices": [{"message": {"content": "whole"}}]})], "without a chunk"),
    "another shape": ([EVENT_STREAM, event({"choices": [7]}), END], "another shape"),
    "silence": ([EVENT_STREAM, delta("a"), 30.0], "no end after 0.5 s"),
    "a page": ([plain(502, b"<html>bad gateway</html>")], "status 502: <html>"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_answer_is_a_failed_request(name):
    steps, message = BAD[name]
    turn = iter(range(1000))

    def script(body):
        return answer(0.0, 0.0, 2) if is_probe(body) or next(turn) % 2 else steps

    with ScriptedServer(script) as server:
        began = time.perf_counter()
        found = run(server, num_prompts=6, seconds=0.5, max_concurrency=1)
        assert time.perf_counter() - began < 10
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (3, 3, 6)
    assert len(found["failures"]) == 1 and found["failures"][0]["count"] == 3
    assert message in found["failures"][0]["error"]
    assert f"failed 3x: {found['failures'][0]['error']}" in report.terminal(found)


def test_a_stream_left_open_behind_its_end_is_no_failure(monkeypatch):
    monkeypatch.setattr(client, "GRACE", 0.1)
    open_end = [*answer(0.0, 0.0, 3)[:-1], 30.0]
    with ScriptedServer(lambda body: open_end) as server:
        found = run(server, num_prompts=2, seconds=20.0)
    assert (found["completed"], found["failed"]) == (2, 0) and found["duration"] < 5
    assert found["median_e2el_ms"] < 1000


def test_a_server_that_takes_fewer_fields_is_asked_for_fewer():
    def old(body):
        if "stream_options" in body:
            return [plain(422, {"detail": "Unexpected fields: stream_options"})]
        return [EVENT_STREAM, delta("a"), delta("b", "stop"), END]

    with ScriptedServer(old) as server:
        found = run(server, num_prompts=2, max_tokens=5)
    assert server.bodies[-1]["max_tokens"] == 5 and "max_completion_tokens" not in server.bodies[-1]
    assert (found["completed"], found["total_output_tokens"], found["counted_chunks"]) == (2, 4, True)
    assert "without stream_options" in found["notes"][0] and "Unexpected fields" in found["notes"][0]
    assert "reports no usage" in found["notes"][1]


def test_a_server_that_passes_over_the_limit_is_asked_by_its_other_name():
    def deaf(body):
        return answer(0.0, 0.01, body.get("max_tokens", 500))

    with ScriptedServer(deaf) as server:
        found = run(server, num_prompts=2, max_tokens=5)
    assert found["total_output_tokens"] == 10
    assert "asked for max_tokens" in found["notes"][0] and "passes over max_completion_tokens" in found["notes"][0]


def test_an_early_chunk_without_text_is_told_apart():
    def eager(body):
        return [EVENT_STREAM, delta(None), 0.2, delta("a"), delta("b", "stop"), usage(3, 2), END]

    with ScriptedServer(eager) as server:
        found = run(server, num_prompts=2)
    assert found["median_ttft_ms"] < 150 < 198 <= found["median_ttft_text_ms"]
    assert any("first chunk has no text" in note for note in found["notes"])


def test_completions_are_asked_with_the_bare_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "one?"}\n{"question": "two?"}\n')

    def script(body):
        last = {
            "choices": [{"text": "x", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        }
        return [EVENT_STREAM, event(last), END]

    with ScriptedServer(script) as server:
        found = run(server, prompts=file, endpoint="completions", ignore_eos=True, extra={"top_k": 3}, key="sesame")
        asked = [each for each in server.bodies if each["prompt"] != client.PROBE]
    assert sorted(each["prompt"] for each in asked) == ["one?", "two?"]
    assert all((each["path"], each["ignore_eos"], each["top_k"]) == ("/v1/completions", True, 3) for each in asked)
    assert set(server.keys) == {"Bearer sesame"} and "sesame" not in json.dumps(found)
    assert found["backend"] == "openai" and found["settings"]["prompts"] == "p.jsonl"
    # one token has no TPOT
    assert (found["total_output_tokens"], found["mean_tpot_ms"]) == (2, 0.0)


def test_requests_arrive_at_the_rate_asked_for():
    with ScriptedServer(lambda body: answer(0.0, 0.0, 2)) as server:
        found = run(server, num_prompts=40, request_rate=40.0, seed=5, warmup=3)
        assert server.bodies[1]["messages"][0]["content"].startswith("Count from")
        gaps = np.diff(server.arrived[4:])
    assert 0.95 <= found["duration"] <= 1.5 and found["request_rate"] == 40.0
    assert gaps.sum() == pytest.approx(1.0, abs=0.15)
    # far from an even beat
    assert gaps.std() / gaps.mean() > 0.5


PAGE = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="a b"}} {0}.0
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {1}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {2}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {3}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} {4}
vllm:spec_decode_num_drafts_created{{engine="0"}} 1.7e9
"""


def test_acceptance_is_what_the_counters_gained():
    pages = [PAGE.format(10, 30, 20, 9, 5), PAGE.format(110, 330, 170, 99, 65)]
    with ScriptedServer(steady, pages=pages) as server:
        found = run(server, num_prompts=1)
    assert found["spec_decode_acceptance_rate"] == pytest.approx(50.0)
    assert found["spec_decode_acceptance_length"] == pytest.approx(2.5)
    assert (found["spec_decode_num_drafts"], found["spec_decode_draft_tokens"]) == (100, 300)
    assert found["spec_decode_accepted_tokens"] == 150
    assert found["spec_decode_per_position_acceptance_rates"] == pytest.approx([0.9, 0.6])
    assert "50.0 % of 300 drafted tokens accepted, 2.50 tokens a target call; by position, %: 90.0 60.0" in (
        report.terminal(found)
    )
    assert scrape.read("vllm:num_requests_running 0\n") is None
    assert scrape.acceptance(scrape.read(pages[0]), scrape.read(pages[0])) == {}


def test_servers_in_turns_on_the_same_prompts(tmp_path):
    order = []

    def script(name, gap):
        def answered(body):
            if not is_probe(body):
                order.append((name, body["messages"][0]["content"]))
            return answer(0.0, 0.0, 2) if is_probe(body) else answer(0.0, gap, 5)

        return answered

    output = tmp_path / "out.json"
    with ScriptedServer(script("s0", 0.02)) as fast, ScriptedServer(script("s1", 0.06)) as slow:
        found = run(fast, slow, num_prompts=4, repeat=3, output=output, max_concurrency=1)
    names = [name for name, _ in order]
    assert names == ["s0"] * 4 + ["s1"] * 8 + ["s0"] * 8 + ["s1"] * 4
    by_round = [{prompt for _, prompt in order[start : start + 8]} for start in (0, 8, 16)]
    assert [len(each) for each in by_round] == [4, 4, 4] and len(set.union(*by_round)) == 12
    ratio = found["ratios"]["s1"]
    assert (ratio["of"], ratio["over"], len(ratio["rounds"])) == ("s0", "s1", 3)
    assert 1.5 < ratio["min"] <= ratio["median"] <= ratio["max"] < 3.2
    rounds = {(each["round"], each["label"]): each["output_throughput"] for each in found["rounds"]}
    assert ratio["rounds"][1] == pytest.approx(rounds[1, "s0"] / rounds[1, "s1"])
    assert found["servers"]["s0"]["completed"] == 12
    assert json.loads(output.read_text())["complete"] is True
    shown = report.terminal(found)
    assert f"s0 / s1, output tokens/s: {ratio['median']:.3f}" in shown and "2 servers · 3 rounds of 4 requests" in shown


def test_a_round_with_failures_has_no_ratio():
    def script(body):
        return answer(0.0, 0.0, 2) if is_probe(body) else BAD["an early end"][0]

    with ScriptedServer(steady) as good, ScriptedServer(script) as bad:
        found = run(good, bad, num_prompts=2)
    assert found["ratios"]["s1"]["rounds"] == [None] and found["ratios"]["s1"]["median"] is None
    assert "no ratio, because requests failed" in report.terminal(found)
    assert "s1, round 1: failed 2x" in report.terminal(found)


def test_documents_can_be_appended(tmp_path):
    output = tmp_path / "all.jsonl"
    with ScriptedServer(lambda body: answer(0.0, 0.0, 2)) as server:
        for number in range(2):
            run(server, num_prompts=1, output=output, append=True, metadata={"try": str(number)})
    assert [json.loads(line)["try"] for line in output.read_text().splitlines()] == ["0", "1"]


def test_prompts_that_come_again_are_noted():
    with ScriptedServer(lambda body: answer(0.0, 0.0, 2)) as server:
        assert "they come again" in run(server, num_prompts=20)["notes"][0]
        assert run(server, num_prompts=18)["notes"] == []


def test_what_cannot_be_asked_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(client, "RETRY", 0.05)
    began = time.perf_counter()
    assert "is not ready after 0.2 s" in refusal(lambda: run("http://127.0.0.1:9", ready_timeout=0.2))
    with ScriptedServer(lambda body: [plain(401, {"error": {"message": "no key"}})]) as server:
        assert "status 401: no key" in refusal(lambda: run(server))
    with ScriptedServer(lambda body: [plain(400, {"error": {"message": "no such field"}})]) as server:
        assert "does not take the requests: status 400: no such field" in refusal(lambda: run(server))
    with ScriptedServer(steady, models=()) as server:
        assert "names no model at /v1/models" in refusal(lambda: run(server))
    with ScriptedServer(lambda body: [plain(200, {"choices": []})]) as server:
        assert "gives no stream of chunks: the stream ended without a chunk" in refusal(lambda: run(server))
    with ScriptedServer(lambda body: [30.0]) as server:
        assert "is not ready after 0.3 s" in refusal(lambda: run(server, ready_timeout=0.3))
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"repeat": 0}, "repeat=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"append": True}, "--append-result needs --output"),
        ({"ready_timeout": 0}, "ready_timeout=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"seconds": 0}, "timeout=0"),
        ({"endpoint": "chats"}, "endpoint='chats'"),
    ],
)
def test_plans_that_make_no_sense(options, message):
    assert message in refusal(lambda: run("http://127.0.0.1:9", **options))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[::1"])
def test_addresses_that_are_none(url):
    assert url in refusal(lambda: run(url))


def test_two_servers_of_one_name():
    with pytest.raises(Exception, match="two servers of one name"):
        Plan([Target("a", "http://x"), Target("a", "http://y")], Ask())


def test_chunks_that_arrive_together_are_still_two():
    both = chunked(
        b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b", "finish_reason": "stop"}]}\n\n'
    )
    with ScriptedServer(lambda body: [EVENT_STREAM, both, END]) as server:
        found = run(server, num_prompts=1, save_detailed=True)
    assert found["itls"] == [[0.0]] and found["total_output_tokens"] == 2
