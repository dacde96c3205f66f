"""A cascade behind the server: a tiny model's real engine as student, a simulated endpoint as teacher."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from cascade_fakes import WordEmbedder, demonstration
from cascade_server import Behaviour, as_asked, fails, hangs, says, sends, serving
from http_server import listening
from starlette.testclient import TestClient

import accel
from accel.artifacts import BaseModel
from accel.bench.simulated import SimulatedTeacher
from accel.engine import service as engine
from accel.engine.service import Service
from accel.errors import ArtifactError, OptionError
from accel.methods.cascade import embedding
from accel.methods.cascade.demos import Demos
from accel.methods.cascade.embedding import UNRELATED
from accel.methods.cascade.store import DemonstrationStore
from accel.server import cascade as served
from accel.server.app import create_app
from accel.server.cascade import CascadeDesk, CascadePlan
from accel.server.metrics import Metrics
from accel.server.settings import ServerSettings
from accel.server.student import ServedEmbedder

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CONTEXT = 2048
SETTINGS = ServerSettings("tiny", model_root="tiny-root")
KEY = "sk-the-operators-own"
PRICES = {"tiny": {"input": 1, "output": 2}, "simulated-teacher": {"input": 100, "output": 200}}
# one sample agrees with itself; three at this temperature never do
AGREE = {"samples": 1, "temperature": 0}
DIFFER = {"samples": 3, "temperature": 2}

Open = Callable[..., TestClient]


@pytest.fixture(scope="module")
def model() -> accel.Model:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return accel.Model(accel.attach(byte_llama(max_position_embeddings=CONTEXT), tokenizer=tokenizer), tokenizer)


@pytest.fixture(scope="module")
def service(model: accel.Model) -> Iterator[Service]:
    service = engine.serve(model, max_rows=4, max_queue=8)
    yield service
    service.close()


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    (tmp_path / "prices.json").write_text(json.dumps(PRICES))
    return tmp_path / "prices.json"


@pytest.fixture
def open_app(service: Service, model: accel.Model, prices: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """``open_app("NAME@URL", option=…)``: a client of a server with a cascade."""
    # the same whether a sentence model is installed or not
    for module in (served, embedding):
        monkeypatch.setattr(module, "packaged_folder", lambda: None)
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def start(
        teacher: str | None = None,
        demos: tuple[Demos, ...] = (),
        threads: int = 4,
        settings: ServerSettings = SETTINGS,
        **options: Any,
    ) -> TestClient:
        told = {"prices": str(prices), "max_tokens": 12, "key_variable": "TEACHER_KEY", **options}
        plan, _ = CascadePlan.read(teacher, told, demos)
        assert plan is not None
        desk = plan.desk(service, model, settings)
        desk = CascadeDesk(desk.cascade, service, desk._preparer, settings, threads=threads)
        metrics = Metrics("tiny", service)
        return TestClient(create_app(service, model, settings, metrics, desk))

    return start


@pytest.fixture(scope="module")
def teacher() -> Iterator[SimulatedTeacher]:
    with SimulatedTeacher(lambda _: "north", lambda _: "south", len) as teacher:
        yield teacher


def named(teacher: SimulatedTeacher) -> str:
    return f"{teacher.model}@{teacher.url}"


def ask(client: Any, fields: dict[str, Any] | None = None, **body: Any) -> Any:
    """A chat that the cascade answers, with its account."""
    extension = {"stats": True, "cascade": fields or {}}
    body = {"messages": [{"role": "user", "content": "which way?"}], "accel": extension, **body}
    return client.post("/v1/chat/completions", json=body)


def figure(client: Any, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def decided(client: Any, decision: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    (found,) = [each for each in lines if each.startswith("accel:cascade_requests_total") and f'"{decision}"' in each]
    return float(found.split()[-1])


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)


def test_samples_that_agree_are_the_models_own_answer(
    open_app: Open, teacher: SimulatedTeacher, model: accel.Model, service: Service
) -> None:
    client, asked = open_app(named(teacher)), teacher.asked
    response = ask(client, AGREE)
    assert response.status_code == 200, response.text
    body, account = response.json(), response.json()["accel"]["cascade"]
    alone = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "which way?"}], "temperature": 0, "max_tokens": 12},
    ).json()
    assert body["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == alone["choices"][0]["finish_reason"]
    assert body["model"] == "tiny" == account["model"] and account["decision"] == "agreed"
    assert body["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 12 and teacher.asked == asked
    cost = (body["usage"]["prompt_tokens"] * 1 + 12 * 2) / 1e6
    assert account["cost"] == pytest.approx(cost) and account["estimated"] and account["saved"] > 0
    headers = response.headers
    assert headers["x-accel-cascade-decision"] == "agreed" and headers["x-accel-cascade-model"] == "tiny"
    assert float(headers["x-accel-cascade-agreement"]) == 1
    assert float(headers["x-accel-cascade-cost"]) == pytest.approx(cost)
    assert float(headers["x-accel-cascade-saved"]) == pytest.approx(account["saved"])


def test_where_they_differ_the_teacher_answers_and_the_drafts_are_charged(
    open_app: Open, teacher: SimulatedTeacher
) -> None:
    client = open_app(named(teacher))
    response = ask(client, DIFFER)
    body, account = response.json(), response.json()["accel"]["cascade"]
    assert body["choices"][0]["message"]["content"] == "north" and body["choices"][0]["finish_reason"] == "stop"
    assert body["model"] == "simulated-teacher" == response.headers["x-accel-cascade-model"]
    assert response.headers["x-accel-cascade-decision"] == "escalated"
    read, written = len("which way?"), len("north")
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (read, written)
    drafts, answer = account["attempts"]
    assert drafts["rejected"] and drafts["samples"] == 3 and drafts["output_tokens"] > 12
    assert answer["cost"] == pytest.approx((read * 100 + written * 200) / 1e6)
    assert account["cost"] == pytest.approx(drafts["cost"] + answer["cost"]) and account["saved"] < 0
    assert float(response.headers["x-accel-cascade-saved"]) == pytest.approx(account["saved"])


def test_three_ways_to_ask_for_it_and_one_not_to(open_app: Open, teacher: SimulatedTeacher) -> None:
    client = open_app(named(teacher), samples=1, temperature=0)
    for body in ({"model": "tiny+cascade", "accel": {}}, {"accel": {"method": "cascade"}}, {"accel": {"cascade": {}}}):
        response = ask(client, **body)
        assert response.headers["x-accel-cascade-decision"] == "agreed", response.text
        assert "accel" not in response.json()
    assert "x-accel-cascade-decision" not in ask(client, model="tiny", accel={}, max_tokens=2).headers


def test_the_models_are_two(open_app: Open, teacher: SimulatedTeacher) -> None:
    client = open_app(named(teacher))
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"]) for card in cards] == [("tiny", "tiny-root"), ("tiny+cascade", "tiny")]
    assert client.get("/v1/models/tiny+cascade").json()["id"] == "tiny+cascade"
    assert client.get("/v1/models/tiny+casc").status_code == 404


def test_a_stream_has_the_text_then_usage_and_account(open_app: Open, teacher: SimulatedTeacher) -> None:
    client = open_app(named(teacher))
    for fields, decision in ((AGREE, "agreed"), (DIFFER, "escalated")):
        response = ask(client, fields, stream=True, stream_options={"include_usage": True})
        assert response.headers["x-accel-cascade-decision"] == decision
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        *deltas, last = [json.loads(line) for line in lines[:-1]]
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in deltas)
        assert text == last["accel"]["cascade"]["text"] and last["choices"] == []
        assert [each["choices"][0]["finish_reason"] for each in deltas][-1] in ("stop", "length")
        assert last["usage"]["completion_tokens"] > 0 and all(each["usage"] is None for each in deltas)
        assert {each["model"] for each in (*deltas, last)} == {last["accel"]["cascade"]["model"]}
    plain = ask(client, AGREE, stream=True, accel={"cascade": AGREE})
    chunks = [json.loads(line[6:]) for line in plain.text.split("\n\n") if line.startswith("data: {")]
    assert all(each["choices"] and "usage" not in each for each in chunks)


def test_samples_share_a_prompt_and_have_a_seed(open_app: Open) -> None:
    client = open_app()
    first, again = (ask(client, {**DIFFER, "seed": 3}).json() for _ in range(2))
    account = first["accel"]["cascade"]
    assert account["text"] == again["accel"]["cascade"]["text"] and account["decision"] == "fallback"
    # one reading of the prompt, three answers
    assert account["input_tokens"] == ask(client, AGREE).json()["accel"]["cascade"]["input_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert ask(client, {**DIFFER, "seed": 4}).json()["accel"]["cascade"]["text"] != account["text"]


def test_stop_texts_end_the_students_answer(open_app: Open) -> None:
    client = open_app()
    text = ask(client, AGREE).json()["choices"][0]["message"]["content"]
    cut = ask(client, AGREE, stop=[text[4:6]]).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(text[4:6])] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize("act", [fails(503, KEY), hangs, sends(b"nonsense")])
def test_without_the_teacher_the_students_best_or_an_error(open_app: Open, act: Behaviour) -> None:
    with serving(act) as server:
        client = open_app(f"big@{server.url}/secret-path", teacher_seconds=1.0)
        best = ask(client, DIFFER)
        assert best.status_code == 200 and best.headers["x-accel-cascade-decision"] == "fallback"
        assert best.json()["model"] == "tiny" and "big" in best.json()["accel"]["cascade"]["notes"][0]
        error = ask(client, {**DIFFER, "without_teacher": "error"})
        assert error.status_code == 502 and error.json()["error"]["type"] == "server_error"
        assert "3 of 3 must; big: no answer" in error.json()["error"]["message"]
        streamed = ask(client, {**DIFFER, "without_teacher": "error"}, stream=True)
        assert streamed.status_code == 502
        for response in (best, error, streamed):
            said = response.text + str(response.headers)
            assert KEY not in said and "127.0.0.1" not in said and "secret-path" not in said
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert decided(client, "fallback") == 1 and decided(client, "failed") == 2


def test_a_teachers_own_words_do_not_break_a_header(open_app: Open) -> None:
    with serving(says("north", model="größer\r\nx-evil: 1\ud800")) as server:
        response = ask(open_app(f"big@{server.url}"), DIFFER)
        assert response.status_code == 200 and "x-evil" not in response.headers
        assert response.json()["choices"][0]["message"]["content"] == "north"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"echo": True}, "echo"),
        ({"top_p": 0.5}, "top_p"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        ({"max_tokens": CONTEXT}, "messages"),
        ({"temperature": 0}, None),
        ({"accel": {"cascade": {}, "options": {"log": "file"}}}, "accel.options"),
        ({"accel": {"cascade": {}, "cartridges": ["unknown"]}}, "accel.cartridges"),
        ({"accel": {"cascade": {"teacher": "x@http://127.0.0.1/v1"}}}, "accel.cascade.teacher"),
        ({"accel": {"cascade": {"store": "kept.db"}}}, "accel.cascade.store"),
        ({"accel": {"cascade": {"prices": "prices.json"}}}, "accel.cascade.prices"),
        ({"accel": {"cascade": {"learn": True}}}, "accel.cascade.learn"),
        ({"accel": {"cascade": {"samples": 65}}}, "accel.cascade.samples"),
        ({"accel": {"cascade": {"samples": 13}}}, "accel.cascade.samples"),
        ({"accel": {"cascade": {"samples": True}}}, "accel.cascade.samples"),
        ({"accel": {"cascade": {"compare": ["exact"]}}}, "accel.cascade.compare"),
        ({"accel": {"cascade": {"student_seconds": 61}}}, "accel.cascade.student_seconds"),
        ({"accel": {"cascade": {"teacher_seconds": 1e9}}}, "accel.cascade.teacher_seconds"),
    ],
)
def test_what_a_cascade_does_not_do_is_refused(
    open_app: Open, teacher: SimulatedTeacher, fields: dict[str, Any], param: str | None
) -> None:
    client, asked = open_app(named(teacher)), teacher.asked
    response = ask(client, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and "\n" not in error["message"] and teacher.asked == asked


def test_a_server_without_one_says_so_and_other_routes_too(
    open_app: Open, service: Service, model: accel.Model
) -> None:
    without = TestClient(create_app(service, model, SETTINGS))
    for extension in ({"method": "cascade"}, {"cascade": {}}):
        response = ask(without, accel=extension)
        assert response.status_code == 400 and "--teacher" in response.json()["error"]["message"]
    assert ask(without, model="tiny+cascade").status_code == 404
    assert len(without.get("/v1/models").json()["data"]) == 1
    client = open_app()
    for body in ({"model": "tiny+cascade"}, {"accel": {"cascade": {}}}):
        response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **body})
        assert response.status_code == 400 and "/v1/chat/completions" in response.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"input": "x", "model": "tiny+cascade"}).status_code == 400


def test_a_client_that_hangs_up_frees_the_engine_and_costs_no_teacher(
    open_app: Open, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = service._batcher.turn
    # twenty seconds for an answer, which only the hang-up can cut short
    monkeypatch.setattr(service._batcher, "turn", lambda: (time.sleep(0.01), turn()))
    with serving(as_asked("north")) as server:
        client = open_app(f"big@{server.url}", max_tokens=1900, samples=12, temperature=1.0)
        with listening(client.app) as url:
            for stream in (False, True):
                body = {"model": "tiny+cascade", "messages": [{"role": "user", "content": "go on"}], "stream": stream}
                with pytest.raises(httpx2.TimeoutException):
                    httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=0.4)
                wait_for(lambda: service.gauges().running + service.gauges().waiting == 0, 2)
        wait_for(lambda: decided(client, "abandoned") == 2)
        assert not server.bodies


def test_more_than_may_wait_are_told_to_come_again(open_app: Open) -> None:
    with serving(hangs) as server:
        client = open_app(f"big@{server.url}", threads=1, teacher_seconds=30.0)
        with listening(client.app) as url:
            body = {"messages": [{"role": "user", "content": "x"}], "accel": {"cascade": DIFFER}}
            answers: list[Any] = []
            first = threading.Thread(
                target=lambda: answers.append(httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60))
            )
            first.start()
            wait_for(lambda: bool(server.bodies))
            refused = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            # the model itself is still there
            assert httpx2.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60).is_success
            server.closing.set()
            first.join(30)
        assert answers[0].headers["x-accel-cascade-decision"] == "fallback"


def test_a_full_queue_is_the_teachers_or_429(open_app: Open, service: Service, teacher: SimulatedTeacher) -> None:
    tickets = service.reserve(service.max_rows + service.max_queue)
    try:
        assert ask(open_app(named(teacher)), AGREE).json()["model"] == "simulated-teacher"
        refused = ask(open_app(), AGREE)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    finally:
        tickets.release()


def test_time_that_is_over_is_no_answer(
    open_app: Open, service: Service, teacher: SimulatedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = service._batcher.turn
    # nineteen seconds for an answer: greedy, since a sampled one might draw its end in the first step
    monkeypatch.setattr(service._batcher, "turn", lambda: (time.sleep(0.01), turn()))
    fields = {"samples": 1, "temperature": 0, "student_seconds": 0.05, "max_tokens": 1900}
    body = ask(open_app(named(teacher)), fields).json()
    assert body["model"] == "simulated-teacher"
    assert "no answer within" in body["accel"]["cascade"]["attempts"][0]["error"]
    failed = ask(open_app(), fields)
    assert failed.status_code == 502 and "tiny: no answer within" in failed.json()["error"]["message"]
    limited = ask(open_app(), {**fields, "student_seconds": 50}, timeout=0.05)
    assert limited.status_code == 502
    wait_for(lambda: service.gauges().running == 0)


def test_metrics_are_sums(open_app: Open, teacher: SimulatedTeacher) -> None:
    client = open_app(named(teacher))
    accounts = [ask(client, fields).json()["accel"]["cascade"] for fields in (AGREE, DIFFER, DIFFER)]
    assert decided(client, "agreed") == 1 and decided(client, "escalated") == 2
    cost, alone = figure(client, "accel:cascade_cost_dollars_total"), sum(each["teacher_only"] for each in accounts)
    assert cost == pytest.approx(sum(each["cost"] for each in accounts))
    assert figure(client, "accel:cascade_teacher_only_dollars_total") == pytest.approx(alone)
    # the student's continuations: one, and twice three
    assert figure(client, "vllm:request_success_total") == 7


def test_an_unpriced_model_is_not_free(open_app: Open) -> None:
    with serving(as_asked("north")) as server:
        client = open_app(f"nobody-knows@{server.url}")
        response = ask(client, DIFFER)
        assert response.json()["accel"]["cascade"]["cost"] is None
        assert "x-accel-cascade-cost" not in response.headers
        assert figure(client, "accel:cascade_unpriced_requests_total") == 1


def demos() -> Demos:
    kept = (demonstration("find the key", "north"), demonstration("boil an egg", "heat water"))
    return Demos(kept, BaseModel("big", None, None, None, 0))


def test_demonstrations_are_found_by_the_engine_itself(
    open_app: Open, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    client = open_app(demos=(demos(),))
    shown = ask(client, {**AGREE, "demonstrations": 2}).json()["accel"]["cascade"]
    assert shown["demonstrations"] == 2 and shown["notes"] == []
    without = ask(client, {**AGREE, "demonstrations": 0}).json()["accel"]["cascade"]
    assert without["demonstrations"] == 0 and without["input_tokens"] < shown["input_tokens"]


def test_the_engines_vectors(service: Service, model: accel.Model) -> None:
    made = ServedEmbedder(service, model)
    found = made.embed(["some text", "", "some text"])
    assert found.shape == (3, made.size) and torch.equal(found[0], found[2])
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert made.embed([]).shape == (0, made.size)
    # what all texts have in common is gone
    assert made.embed(UNRELATED).mean(0).norm() < 0.5
    assert made.digest == ServedEmbedder(service, model).digest


def test_a_store_of_another_embedder_is_refused(open_app: Open, tmp_path: Path) -> None:
    with DemonstrationStore(tmp_path / "kept.db", WordEmbedder()) as store:
        store.add(demos().demonstrations)
    with pytest.raises(ArtifactError, match="words"):
        open_app(store=str(tmp_path / "kept.db"))


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        ("big", {}, "MODEL@URL"),
        (None, {"teacher": "big@http://127.0.0.1/v1"}, "--teacher"),
        (None, {"sample": 3}, "samples"),
        ("big@http://127.0.0.1/v1", {"threshold": 2}, "threshold=2"),
    ],
)
def test_what_a_command_line_may_not_say(teacher: str | None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CascadePlan.read(teacher, options, ())


def test_no_words_no_cascade() -> None:
    assert CascadePlan.read(None, {}, ()) == (None, [])
    plan, others = CascadePlan.read(None, {}, ["smollm2-135m-draft", demos()])
    assert plan is not None and [each.kind for each in others] == ["draft"]


def test_a_model_without_a_template_is_no_student() -> None:
    tokenizer = byte_tokenizer()
    plain = accel.Model(accel.attach(byte_llama(max_position_embeddings=64), tokenizer=tokenizer), tokenizer)
    service = engine.serve(plain)
    try:
        plan, _ = CascadePlan.read(None, {"samples": 2, "max_tokens": 8}, ())
        assert plan is not None
        with pytest.raises(OptionError, match="no chat template"):
            plan.desk(service, plain, SETTINGS)
    finally:
        service.close()
