"""The client against a real socket: what it sends, what it believes, what it tries again, and that it always ends."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from email.utils import formatdate

import pytest
from cascade_server import (
    USAGE,
    after,
    as_asked,
    breaks_off,
    completion,
    drips,
    drips_body,
    fails,
    hangs,
    hangs_up,
    says,
    sends,
    serving,
)
from refusals import refusal

from accel.errors import AccelError
from accel.methods.cascade import background, endpoint
from accel.methods.cascade.answerer import Sample, Sampling, Unanswered, check_messages
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.prices import Usage

ASKED = [{"role": "user", "content": "2 + 2?"}]
CHARGED = Usage(100, 40, 7)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy in between, and short waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


def ask(server, n=1, settings=None, seconds=10.0, **choices):
    made = Endpoint(server.url, "m", **choices)
    try:
        return made.sample(ASKED, n, settings or Sampling(), seconds=seconds)
    finally:
        made.close()


def unanswered(server, n=1, seconds=10.0, **choices):
    with pytest.raises(Unanswered) as caught:
        ask(server, n, seconds=seconds, **choices)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return caught.value


def test_what_is_sent_and_what_comes_back():
    settings = Sampling(0.5, 9, 0.9, ("\n",), 3)
    with serving(says("4", "four")) as server:
        reply = ask(server, 2, settings, api_key="secret", extra={"user": "u"}, limit_field="max_completion_tokens")
    assert server.bodies == [
        {
            "model": "m",
            "messages": ASKED,
            "temperature": 0.5,
            "max_completion_tokens": 9,
            "stream": False,
            "n": 2,
            "top_p": 0.9,
            "stop": ["\n"],
            "seed": 3,
            "user": "u",
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert reply.samples == (Sample("4"), Sample("four")) and reply.usage == CHARGED
    assert reply.model == "served-model" and 0 < reply.seconds < 10


def test_the_least_is_sent():
    with serving(says("4")) as server:
        ask(server)
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_tokens", "stream"}
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "first", [fails(429), fails(500), fails(503), hangs_up, breaks_off, fails(429, Retry_After="0.1")]
)
def test_what_may_pass_is_tried_again(first):
    with serving(first, first, as_asked("4")) as server:
        began = time.monotonic()
        reply = ask(server, 2)
        assert [each.text for each in reply.samples] == ["4", "4"] and len(server.bodies) == 3
        assert reply.usage == CHARGED and reply.seconds <= time.monotonic() - began


@pytest.mark.parametrize(
    ("act", "says_so", "requests"),
    [
        (fails(401, "bad key"), "bad key (HTTP 401)", 1),
        (fails(404, "no such model"), "no such model (HTTP 404)", 1),
        (fails(503, "down\nfor now"), "down (HTTP 503)", 3),
        (hangs_up, "RemoteProtocolError", 3),
        (sends(b"<html>busy</html>"), "no chat completion: <html>busy</html> (HTTP 200)", 1),
        (sends(b""), "no chat completion: nothing", 1),
        (sends(b"[" * 100_000), "no chat completion", 1),
        (sends(b"\xff\xfe\x00"), "no chat completion", 1),
        (sends(b'{"choices": [{}]}'), "no chat completion", 1),
        (sends(b'{"choices": 3}'), "no chat completion", 1),
        (sends(b'{"detail": "wrong field"}', 422), "wrong field (HTTP 422)", 1),
        (sends(b'{"error": "plain words"}', 400), "plain words (HTTP 400)", 1),
        (sends(b"", 302, Location="http://127.0.0.1:1/"), "(HTTP 302)", 1),
        (says(), "without choices", 1),
    ],
)
def test_failures_are_one_line(act, says_so, requests):
    with serving(act) as server:
        error = unanswered(server, retries=2)
    assert says_so in str(error) and str(error).startswith("m at http") and len(server.bodies) == requests


def test_an_answer_without_choices_is_charged():
    with serving(says()) as server:
        assert unanswered(server).usage == CHARGED
    with serving(fails(500)) as server:
        assert unanswered(server, retries=0).usage == Usage()


@pytest.mark.parametrize("act", [hangs, drips, drips_body, fails(503, Retry_After="3600")], ids=str)
def test_nothing_outlasts_its_limit(act):
    with serving(act) as server:
        began = time.monotonic()
        error = unanswered(server, seconds=0.4)
        assert time.monotonic() - began < 5
    expected = "not now (HTTP 503)" if "fails" in str(act) else "no answer within 0.4 s"
    assert expected in str(error)
    # what is refused for an hour is not waited for
    assert error.seconds < 5


def test_a_date_to_come_back_at():
    assert 3 < endpoint._seconds(formatdate(time.time() + 5, usegmt=True)) <= 5
    assert endpoint._seconds(formatdate(time.time() - 5, usegmt=True)) == 0
    assert [endpoint._seconds(each) for each in (None, "soon", "-3", "2.5")] == [0, 0, 0, 2.5]


def test_nobody_there():
    with serving(hangs) as server:
        url = server.url
    made = Endpoint(url, "m", retries=1)
    assert "ConnectError" in refusal(lambda: made.sample(ASKED, 1, Sampling(), seconds=5.0))
    nowhere = Endpoint("http://no-such-host.invalid/v1", "m", retries=0)
    with pytest.raises(Unanswered):
        nowhere.sample(ASKED, 1, Sampling(), seconds=5.0)


def test_a_server_that_ignores_n_is_asked_for_the_rest():
    with serving(says("4")) as server:
        made = Endpoint(server.url, "m")
        assert made.shares_prompt
        reply = made.sample(ASKED, 3, Sampling(seed=5), seconds=10.0)
        assert len(reply.samples) == 3 and reply.usage == Usage(300, 120, 21)
        assert [body.get("n") for body in server.bodies] == [3, None, None]
        # samples of one seed would be one sample
        assert sorted(body["seed"] for body in server.bodies) == [5, 6, 7]
        # it is known now, and said
        assert not made.shares_prompt
        made.sample(ASKED, 2, Sampling(), seconds=10.0)
        assert [body.get("n") for body in server.bodies[3:]] == [None, None]
        made.close()


def test_a_server_that_refuses_n_is_asked_one_by_one():
    def only_one(handler, body):
        (fails(422, "n is not supported") if "n" in body else says("4"))(handler, body)

    with serving(only_one) as server:
        assert len(ask(server, 3).samples) == 3 and len(server.bodies) == 4
    # a server that refuses everything is not blamed on n
    with serving(fails(400, "bad messages")) as server:
        made = Endpoint(server.url, "m")
        assert "bad messages" in refusal(lambda: made.sample(ASKED, 2, Sampling(), seconds=10.0))
        assert made.shares_prompt
        made.close()


def test_more_choices_than_asked_for_are_cut():
    with serving(says("a", "b", "c")) as server:
        assert [each.text for each in ask(server, 2).samples] == ["a", "b"]


def test_single_requests_run_at_the_same_time_and_one_failure_fails_all():
    with serving(after(0.3, says("4"))) as server:
        began = time.monotonic()
        assert len(ask(server, 6, one_by_one=True).samples) == 6
        assert time.monotonic() - began < 6 * 0.3
    with serving(says("4"), fails(404, "gone")) as server:
        error = unanswered(server, 2, one_by_one=True)
        assert "gone" in str(error) and error.usage == CHARGED


@pytest.mark.parametrize(
    ("usage", "understood"),
    [
        (USAGE, CHARGED),
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(5, 0, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(5, 0, 2)),
        (None, None),
        ({"prompt_tokens": 5}, None),
        ({"prompt_tokens": "5", "completion_tokens": 2}, None),
        ({"prompt_tokens": -5, "completion_tokens": 2}, None),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 6}}, None),
        ([], None),
    ],
)
def test_usage_is_believed_or_unknown(usage, understood):
    with serving(says("4", usage=usage)) as server:
        assert ask(server).usage == understood


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, ""), ("", ""), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"), (3, "")],
)
def test_contents_that_are_no_text(content, text):
    with serving(says(content)) as server:
        assert ask(server).samples[0].text == text


def test_finish_reasons_are_kept():
    raw = completion("a", "b")
    raw["choices"][1]["finish_reason"] = "length"
    raw["choices"][0]["finish_reason"] = None
    with serving(says("x", choices=raw["choices"])) as server:
        assert [each.finish for each in ask(server, 2).samples] == ["stop", "length"]


def test_an_endless_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1000)
    with serving(sends(b"x" * 5000)) as server:
        assert "an answer of more than" in str(unanswered(server))


def test_a_key_is_never_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "hidden-key")
    made = Endpoint("http://127.0.0.1:9/v1", "m", key_variable="SOME_KEY", retries=0)
    assert made.api_key == "hidden-key" and "hidden-key" not in repr(made)
    assert "hidden-key" not in refusal(lambda: made.sample(ASKED, 1, Sampling(), seconds=2.0))
    assert "hidden" not in refusal(lambda: Endpoint("http://a/v1", "m", api_key="hidden\nkey"))
    monkeypatch.delenv("SOME_KEY")
    assert "SOME_KEY holds no key" in refusal(lambda: Endpoint("http://a/v1", "m", key_variable="SOME_KEY"))


def test_refusals():
    for url in ("", "example.org/v1", "ftp://a/v1", "http://", None):
        assert "base_url=" in refusal(lambda url=url: Endpoint(url, "m"))
    assert "model=''" in refusal(lambda: Endpoint("http://a/v1", ""))
    assert "retries=-1" in refusal(lambda: Endpoint("http://a/v1", "m", retries=-1))
    for extra in ({"a": {1}}, {"a": float("nan")}):
        assert "extra=" in refusal(lambda extra=extra: Endpoint("http://a/v1", "m", extra=extra))
    made = Endpoint("http://127.0.0.1:9/v1", "m")
    for messages, why in [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([{"role": "user"}], "messages[0]: must have"),
        ([{"role": "judge", "content": "x"}], "role is 'judge'"),
        ([{"role": "user", "content": "\ud800"}], "half a character"),
    ]:
        assert why in refusal(lambda messages=messages: made.sample(messages, 1, Sampling(), seconds=1.0))
    assert "n=0" in refusal(lambda: made.sample(ASKED, 0, Sampling(), seconds=1.0))
    assert "seconds=0" in refusal(lambda: made.sample(ASKED, 1, Sampling(), seconds=0))
    assert "temperature=3" in refusal(lambda: Sampling(3))
    assert "max_tokens=0" in refusal(lambda: Sampling(max_tokens=0))
    assert "top_p=0" in refusal(lambda: Sampling(top_p=0))
    assert "stop=" in refusal(lambda: Sampling(stop="x"))
    for seed in ("x", 1.5, True, 2**63):
        assert "seed=" in refusal(lambda seed=seed: Sampling(seed=seed))


def test_many_threads_share_an_endpoint():
    with serving(as_asked("4")) as server:
        made = Endpoint(server.url, "m")
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(made.sample(ASKED, 2, Sampling(), seconds=20.0)))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.close()
    assert len(replies) == 12 and all(len(reply.samples) == 2 for reply in replies)


def test_it_can_be_asked_inside_an_event_loop():
    async def main(server):
        return ask(server)

    with serving(says("4")) as server:
        assert asyncio.run(main(server)).samples[0].text == "4"


def test_a_closed_endpoint_opens_again():
    with serving(says("4")) as server:
        made = Endpoint(server.url, "m")
        for _ in range(2):
            assert made.sample(ASKED, 1, Sampling(), seconds=10.0).samples
            made.close()
            made.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_loop_starts_again_behind_a_fork():
    async def one():
        return 1

    assert background.run(one, 5.0) == 1
    child = os.fork()
    if child == 0:
        os._exit(10 + background.run(one, 5.0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11


def test_unanswered_is_one_of_ours():
    assert issubclass(Unanswered, AccelError)


def test_tokens_that_failures_report_are_charged():
    failed = json.dumps({"error": {"message": "not now"}, "usage": USAGE}).encode()
    with serving(sends(failed, 503), sends(failed, 503), says("4")) as server:
        assert ask(server).usage == CHARGED + CHARGED + CHARGED
    with serving(sends(failed, 503)) as server:
        assert unanswered(server, retries=1).usage == CHARGED + CHARGED
    # an error in the place of an answer, as gateways send it
    with serving(sends(failed)) as server:
        assert unanswered(server).usage == CHARGED
    # an answer of which nobody says what it took, and nothing in it
    with serving(says(usage=None)) as server:
        assert unanswered(server).usage is None


@pytest.mark.parametrize("n", [1, 2])
def test_whatever_goes_wrong_is_unanswered(monkeypatch, n):
    monkeypatch.setenv("HTTPS_PROXY", "bogus://nowhere")
    with serving(says("4")) as server:
        assert "bogus" in str(unanswered(server, n, one_by_one=True))


def test_half_a_character_is_replaced():
    with serving(sends(b'{"choices": [{"message": {"content": "a\\ud800\\ud83d\\ude00"}}]}')) as server:
        said = ask(server).samples[0].text
    assert said == "a\ufffd😀"
    # what was said can be part of the next question
    check_messages([{"role": "assistant", "content": said}])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_holds_the_lock():
    with background._lock:
        child = os.fork()
        if child == 0:
            threading.Timer(5.0, os._exit, (1,)).start()
            background.current()
            os._exit(10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10


def test_a_call_in_a_thread_is_left_alone_when_its_time_is_over():
    began, let_go = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        background.within(lambda: let_go.wait(20), 0.1)
    assert time.monotonic() - began < 5
    let_go.set()
    assert background.within(lambda: 3, 5.0) == 3
    with pytest.raises(KeyError, match="x"):
        background.within(lambda: {}["x"], 5.0)
