"""The simulated teacher through the cascade's own client: what it says, how often it errs, what it counts."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from refusals import refusal

from accel.bench.simulated import SimulatedTeacher
from accel.errors import OptionError
from accel.methods.cascade import endpoint
from accel.methods.cascade.answerer import Sampling, Unanswered
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.prices import Usage

SETTINGS = Sampling(0.0, 16)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy in between, and short waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


def words(text):
    return len(text.split())


def double(messages):
    return f"it is {2 * int(messages[-1]['content'])}"


def mistaken(messages):
    return f"perhaps {2 * int(messages[-1]['content']) + 1}"


def simulated(accuracy=1.0, seed=0, policy=double):
    return SimulatedTeacher(policy, mistaken, words, accuracy=accuracy, seed=seed)


def question(number):
    return [{"role": "system", "content": "double the number"}, {"role": "user", "content": str(number)}]


def ask(client, number, n=1):
    return client.sample(question(number), n, SETTINGS, seconds=10.0)


def answers(teacher, numbers, n=1):
    client = Endpoint(teacher.url, teacher.model)
    try:
        return [tuple(sample.text for sample in ask(client, number, n).samples) for number in numbers]
    finally:
        client.close()


def post(teacher, body, path="/v1/chat/completions", method="POST", headers=None):
    """Status and JSON of one raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", int(teacher.url.split(":")[2].split("/")[0]), timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_round_trip():
    with simulated() as teacher:
        assert (teacher.model, teacher.asked) == ("simulated-teacher", 0)
        client = Endpoint(teacher.url, teacher.model)
        one, three = ask(client, 21), ask(client, 21, 3)
        client.close()
        assert [each.text for each in one.samples] == ["it is 42"] and one.samples[0].finish == "stop"
        assert one.usage == Usage(4, 0, 3) and one.model == "simulated-teacher"
        # one request for all samples: the prompt is read once
        assert [each.text for each in three.samples] == ["it is 42"] * 3 and three.usage == Usage(4, 0, 9)
        assert teacher.asked == 2 and client.shares_prompt


@pytest.mark.parametrize("accuracy", [0.5, 0.9])
def test_it_errs_as_often_as_it_says(accuracy):
    """400 answers, within four standard deviations of a binomial's mean."""
    with simulated(accuracy) as teacher:
        said = answers(teacher, range(400))
        right = sum(text == f"it is {2 * number}" for number, (text,) in enumerate(said))
        assert all(text in (f"it is {2 * n}", f"perhaps {2 * n + 1}") for n, (text,) in enumerate(said))
        assert abs(right - 400 * accuracy) <= 4 * (400 * accuracy * (1 - accuracy)) ** 0.5
        assert teacher.asked == 400


def test_the_ends_are_exact():
    for accuracy, text in ((1, "it is 2"), (0, "perhaps 3")):
        teacher = simulated(accuracy)
        said = {teacher.answer({"model": teacher.model, "messages": question(1)})["choices"][0]["message"]["content"]}
        assert said == {text}
        assert {teacher.errs(question(number)) for number in range(500)} == {not accuracy}


def test_answers_repeat():
    with simulated(0.5, seed=3) as teacher:
        first = answers(teacher, range(40))
        assert answers(teacher, range(39, -1, -1)) == first[::-1]
    with simulated(0.5, seed=3) as teacher:
        assert answers(teacher, range(40)) == first
        several = answers(teacher, range(40), 3)
        # the first sample is what one alone is; the others err for themselves
        assert [each[:1] for each in several] == first and any(len(set(each)) > 1 for each in several)
    with simulated(0.5, seed=4) as teacher:
        assert answers(teacher, range(40)) != first


def test_roles_are_part_of_a_question():
    teacher = simulated(0.5)
    other = [{"role": "assistant", "content": "double the number"}]
    assert {teacher.errs([*other, *question(n)[1:]]) == teacher.errs(question(n)) for n in range(50)} == {True, False}


def test_many_may_ask_at_once():
    with simulated(0.7) as teacher, ThreadPoolExecutor(8) as pool:
        client = Endpoint(teacher.url, teacher.model)
        said = list(pool.map(lambda number: ask(client, number % 10).samples[0].text, range(80)))
        client.close()
        assert teacher.asked == 80 and all(said[number] == said[number % 10] for number in range(80))


REFUSED = [
    (b"{", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b"\xff", "no JSON"),
    (b"[]", "JSON object"),
    ({"messages": question(1)}, "'simulated-teacher'"),
    ({"model": "gpt-4.1", "messages": question(1)}, "'gpt-4.1'"),
    ({"model": "simulated-teacher"}, "messages"),
    ({"model": "simulated-teacher", "messages": []}, "messages"),
    ({"model": "simulated-teacher", "messages": "hello"}, "messages"),
    ({"model": "simulated-teacher", "messages": [{"role": "user"}]}, "messages[0]"),
    ({"model": "simulated-teacher", "messages": [{"role": "robot", "content": ""}]}, "robot"),
    *(({"model": "simulated-teacher", "messages": question(1), "n": n}, f"n={n!r}") for n in (0, 129, 1.5, "2", None)),
    ({"model": "simulated-teacher", "messages": question(1), "stream": True}, "stream"),
]


@pytest.mark.parametrize(("body", "says"), REFUSED)
def test_bad_requests_are_refused(body, says):
    with simulated() as teacher:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, said = post(teacher, data)
        assert status == 400 and set(said) == {"error"}
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert says in said["error"]["message"] and said["error"]["type"] == "invalid_request_error"
        assert teacher.asked == 0
        # and the next one is answered
        assert answers(teacher, [4]) == [("it is 8",)]


def test_other_places_and_ways():
    with simulated() as teacher:
        good = json.dumps({"model": teacher.model, "messages": question(1)})
        assert post(teacher, good, "/v1/completions")[0] == 404
        assert post(teacher, None, "/v1/models", "GET")[0] == 404
        for length in ("-1", "many", ""):
            status, said = post(teacher, None, headers={"Content-Length": length})
            assert status == 400 and "Content-Length" in said["error"]["message"]


def refuses(messages):
    raise OptionError("goal='x': none of this flat's")


@pytest.mark.parametrize(
    ("policy", "says"),
    [(refuses, "none of this flat's (HTTP 400)"), (lambda messages: {}["x"], "KeyError: 'x' (HTTP 500)")],
)
def test_a_policy_that_fails_is_heard(policy, says):
    with simulated(policy=policy) as teacher:
        client = Endpoint(teacher.url, teacher.model, retries=0)
        with pytest.raises(Unanswered, match="simulated-teacher") as caught:
            ask(client, 1)
        client.close()
        assert says in str(caught.value) and teacher.asked == 0


def test_it_ends_with_its_context():
    with simulated() as teacher:
        client = Endpoint(teacher.url, teacher.model, retries=0)
        ask(client, 1)
    with pytest.raises(Unanswered):
        client.sample(question(1), 1, SETTINGS, seconds=2.0)
    client.close()
    assert not any("serve_forever" in str(thread) for thread in threading.enumerate())


def test_refusals():
    for accuracy in (-0.1, 1.1, float("nan"), "0.5", True):
        assert "accuracy" in refusal(lambda accuracy=accuracy: simulated(accuracy))
