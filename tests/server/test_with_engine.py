"""The app over the real engine and a tiny model: what it says is what generate() says, however many ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from http_server import listening
from starlette.testclient import TestClient

import accel
from accel.engine import service as engine
from accel.server.app import create_app
from accel.server.settings import ServerSettings

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
# room for what tells of tools, in bytes
CONTEXT = 4096
PROMPTS = [f"prompt {number} says " + "x" * number for number in range(8)]


@pytest.fixture(scope="module")
def model() -> accel.Model:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return accel.Model(accel.attach(byte_llama(max_position_embeddings=CONTEXT), tokenizer=tokenizer), tokenizer)


@pytest.fixture(scope="module")
def offline() -> accel.Model:
    """The same model, which a service does not occupy."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return accel.Model(byte_llama(max_position_embeddings=CONTEXT), tokenizer)


@pytest.fixture(scope="module")
def app(model: accel.Model) -> Iterator[Any]:
    service = engine.serve(model, max_rows=4, max_queue=64)
    try:
        app = create_app(service, model, ServerSettings("tiny"))
        app.state.service = service
        yield app
    finally:
        service.close()


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    return TestClient(app)


def expected(offline: accel.Model, prompt: str, tokens: int) -> str:
    return offline.generate(prompt, max_new_tokens=tokens, do_sample=False)


def complete(client: Any, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 24, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_greedy_answers_are_those_of_generate(client: Any, offline: accel.Model) -> None:
    texts = [choice["text"] for choice in complete(client, PROMPTS)["choices"]]
    assert texts == [expected(offline, prompt, 24) for prompt in PROMPTS]
    assert len(set(texts)) > 1


def test_a_chat_is_the_templates(client: Any, offline: accel.Model) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 20}
    body = client.post("/v1/chat/completions", json=fields).json()
    assert body["choices"][0]["message"]["content"] == offline.chat("Hi", max_new_tokens=20, do_sample=False)


def test_many_at_once_over_a_socket(app: Any, offline: accel.Model) -> None:
    wanted = {prompt: expected(offline, prompt, 24) for prompt in PROMPTS}
    with listening(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def ask(number: int) -> tuple[str, str]:
            prompt = PROMPTS[number % len(PROMPTS)]
            asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
            if number % 2:
                return prompt, client.completions.create(**asked).choices[0].text
            stream = client.completions.create(**asked, stream=True)
            return prompt, "".join(chunk.choices[0].text for chunk in stream)

        with ThreadPoolExecutor(16) as pool:
            for prompt, text in pool.map(ask, range(32)):
                assert text == wanted[prompt]
    assert app.state.service.gauges().running == 0


def test_draws_repeat_with_their_seed_and_differ_among_continuations(client: Any) -> None:
    fields: dict[str, Any] = {"temperature": 1, "n": 3, "seed": 5}
    first, again = (complete(client, "x", **fields)["choices"] for _ in range(2))
    assert first == again
    assert len({choice["text"] for choice in first}) == 3
    assert complete(client, "x", **fields | {"seed": 6})["choices"] != first


def test_logprobs_are_the_models(client: Any, offline: accel.Model) -> None:
    # a bias decides what is said, and has no say in how likely the model holds it
    (a,) = offline.tokenizer("a")["input_ids"]
    body = complete(client, "abc", max_tokens=3, logprobs=2, echo=True, logit_bias={str(a): 100})
    found = body["choices"][0]["logprobs"]
    ids = torch.tensor([offline.tokenizer(body["choices"][0]["text"])["input_ids"]])
    assert body["choices"][0]["text"] == "abcaaa"
    with torch.no_grad():
        scores = offline.model(ids).logits[0].log_softmax(-1)
    wanted = [float(scores[place, ids[0, place + 1]]) for place in range(5)]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert len(found["top_logprobs"][4]) in (2, 3)
    assert max(found["top_logprobs"][4].values()) == pytest.approx(float(scores[3].max()), abs=1e-4)


def test_penalties_biases_and_ends(client: Any, offline: accel.Model) -> None:
    (a,) = offline.tokenizer("a")["input_ids"]
    assert complete(client, "x", logit_bias={str(a): 100}, max_tokens=5)["choices"][0]["text"] == "aaaaa"
    ended = complete(client, "x", logit_bias={"0": 100}, max_tokens=9)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1
    later = complete(client, "x", logit_bias={"0": 100}, max_tokens=9, min_tokens=4)
    assert later["usage"]["completion_tokens"] == 5
    stopped = complete(client, "x", logit_bias={str(a): 100}, max_tokens=90, stop=["aaa"])
    assert stopped["choices"][0]["text"] == "" and stopped["usage"]["completion_tokens"] == 3


SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["on", "size"],
    "additionalProperties": False,
}


def test_text_has_the_form_that_was_asked_for(client: Any) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA}}
    for extension in ({}, {"accel": {"method": "plain"}}):
        body = complete(client, "lamp:", response_format=given, max_tokens=200, temperature=1, seed=1, **extension)
        found = json.loads(body["choices"][0]["text"])
        assert found.keys() == {"on", "size"} and found["size"] in ("small", "large")
        assert body["choices"][0]["finish_reason"] == "stop"
    assert complete(client, "x", guided_choice=["left", "right"])["choices"][0]["text"] in ("left", "right")
    digits = complete(client, "x", structured_outputs={"regex": "[0-9]{4}"})["choices"][0]["text"]
    assert len(digits) == 4 and digits.isdigit()
    refused = client.post("/v1/completions", json={"prompt": "x", "guided_regex": "("})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "guided_regex"


def test_a_forced_call_is_a_call(client: Any) -> None:
    function = {"name": "lamp", "parameters": {k: v for k, v in SCHEMA.items() if k != "additionalProperties"}}
    fields = {
        "messages": [{"role": "user", "content": "Light!"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "lamp"}},
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "seed": 3,
    }
    whole = client.post("/v1/chat/completions", json=fields)
    assert whole.status_code == 200, whole.text
    choice = whole.json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "lamp" and json.loads(call["function"]["arguments"]).keys() == {"on", "size"}
    lines = client.post("/v1/chat/completions", json=fields | {"stream": True}).text.split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    parts = [part for each in deltas for part in each["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "lamp" and parts[0]["id"]
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
    assert [each["finish_reason"] for each in deltas if each["finish_reason"]] == ["tool_calls"]


def test_embeddings_are_hidden_states(client: Any, offline: accel.Model) -> None:
    ids = offline.tokenizer("some text")["input_ids"]
    with torch.no_grad():
        state = offline.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    found = client.post("/v1/embeddings", json={"input": ["some text", "else"]}).json()["data"]
    assert found[0]["embedding"] == pytest.approx((state / state.norm()).tolist(), abs=1e-5)
    assert sum(each**2 for each in found[1]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_a_prompt_is_not_read_twice(client: Any) -> None:
    prompt = "the same long beginning of a prompt, " * 5
    complete(client, prompt, max_tokens=1, accel={"salt": "s"})
    details = complete(client, prompt, max_tokens=1, accel={"salt": "s"})["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > 100
    other = complete(client, prompt, max_tokens=1, accel={"salt": "t"})["usage"]["prompt_tokens_details"]
    assert other["cached_tokens"] == 0


def test_figures_and_methods(client: Any) -> None:
    fields = {"method": "speculative", "options": {"drafter": "ngram", "draft_length": 3}, "stats": True}
    drafted = complete(client, "abcabcabcabc", accel=fields)
    assert drafted["accel"]["method"] == "speculative" and drafted["accel"]["generated_tokens"] == 24
    plain = complete(client, "abcabcabcabc", accel={"method": "plain", "stats": True})
    assert plain["accel"]["method"] == "plain" and plain["choices"][0]["text"] == drafted["choices"][0]["text"]


def test_a_deadline_ends_with_abort(client: Any) -> None:
    body = complete(client, "x", max_tokens=500, ignore_eos=True, timeout=0.05)
    assert body["choices"][0]["finish_reason"] == "abort" and body["usage"]["completion_tokens"] < 500


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"accel": {"options": {"draft_length": 99}}}, "draft_length=99"),
        ({"accel": {"method": "dparallel"}}, "dparallel"),
        ({"accel": {"cartridges": ["none"]}}, "cartridge"),
        ({"max_tokens": CONTEXT}, f"maximum context length is {CONTEXT}"),
        ({"n": 64, "max_tokens": 1, "prompt": ["x", "y"]}, ""),
    ],
)
def test_what_cannot_be_done_is_refused(client: Any, offline: accel.Model, fields: Any, words: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "temperature": 0, **fields})
    assert response.status_code in (400, 429) and words in response.json()["error"]["message"]
    assert complete(client, PROMPTS[0])["choices"][0]["text"] == expected(offline, PROMPTS[0], 24)


def test_a_dead_engine_says_so(client: Any, model: accel.Model) -> None:
    other = accel.Model(accel.attach(byte_llama(max_position_embeddings=64)), model.tokenizer)
    service = engine.serve(other)
    dying = TestClient(create_app(service, other, ServerSettings("tiny")))

    def fail(*_: Any, **__: Any) -> Any:
        raise SystemError("the device is lost")

    service._turn = fail  # type: ignore[method-assign]
    # it is in the middle of a wait, and fails with the job that wakes it
    assert dying.post("/v1/completions", json={"prompt": "x"}).status_code in (200, 503)
    assert dying.post("/v1/completions", json={"prompt": "x"}).status_code == 503
    assert dying.get("/health").status_code == 503
    service.close()
