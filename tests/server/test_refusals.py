"""What is wrong with a request is a 4xx in OpenAI's shape, and the server works on; nothing is a 5xx but a failure."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from accel.errors import OptionError

USER = [{"role": "user", "content": "x"}]
# path, fields, the field that is to blame
BAD_FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt"),
    ("completions", {"prompt": ["a", ""]}, "prompt"),
    ("completions", {"prompt": [257]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt.0"),
    ("completions", {"prompt": [10**40]}, "prompt.0"),
    ("completions", {"prompt": [1.5]}, "prompt.0"),
    ("completions", {"prompt": [True]}, "prompt.0"),
    ("completions", {"prompt": ["a", 3]}, "prompt.1"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {}, "prompt"),
    ("completions", {"prompt": ["x"] * 65}, "prompt"),
    ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": "x", "logprobs": -1}, "logprobs"),
    ("completions", {"prompt": "x", "logprobs": "5"}, "logprobs"),
    ("completions", {"prompt": "x", "logprobs": True}, "logprobs"),
    ("completions", {"prompt": "x", "n": 0}, "n"),
    ("completions", {"prompt": "x", "n": 65}, "n"),
    ("completions", {"prompt": "x", "n": 10**50}, "n"),
    ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": "x", "max_tokens": -5}, "max_tokens"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature"),
    ("completions", {"prompt": "x", "temperature": "hot"}, "temperature"),
    ("completions", {"prompt": "x", "top_p": 0}, "top_p"),
    ("completions", {"prompt": "x", "top_k": -2}, "top_k"),
    ("completions", {"prompt": "x", "seed": 2**63}, "seed"),
    ("completions", {"prompt": "x", "stop": ""}, "stop"),
    ("completions", {"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ("completions", {"prompt": "x", "stop_token_ids": [999]}, "stop_token_ids"),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a"),
    ("completions", {"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"²": 1}}, "logit_bias.²"),
    ("completions", {"prompt": "x", "logit_bias": {"9": 101}}, "logit_bias.9"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"prompt": "x", "stream": "yes"}, "stream"),
    ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "guided_regex": "a", "guided_json": {}}, "structured_outputs"),
    ("completions", {"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ("completions", {"prompt": "x", "timeout": 0}, "timeout"),
    ("completions", {"prompt": "x", "accel": {"method": "magic"}}, "accel.method"),
    ("completions", {"prompt": "x", "accel": {"method": "cascade"}}, "accel.method"),
    ("completions", {"prompt": "x", "accel": {"options": {"log": "file"}}}, "accel.options"),
    ("completions", {"prompt": "x", "accel": {"cartridges": ["../secret"]}}, "accel.cartridges.0"),
    ("completions", {"prompt": "x", "accel": {"cartridges": ["secret"]}}, "accel.cartridges"),
    ("completions", {"prompt": "x", "accel": {"cascade": {}}}, "accel.cascade"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "x"}, "messages"),
    ("chat/completions", {"messages": ["x"]}, "messages.0"),
    ("chat/completions", {"messages": [*USER, {"role": "wizard", "content": "x"}]}, "messages.1"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ("chat/completions", {"messages": [{"role": "assistant"}]}, "messages.0"),
    ("chat/completions", {"messages": [*USER, *USER, {"role": "user", "content": 3}]}, "messages.2.content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages.0.content.0.type",
    ),
    ("chat/completions", {"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    ("chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"messages": USER, "logprobs": 1}, "logprobs"),
    ("chat/completions", {"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat/completions", {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"messages": USER, "tool_choice": {"function": {"name": "f"}}}, "tool_choice"),
    ("chat/completions", {"messages": USER, "tools": [{"type": "function"}]}, "tools.0.function"),
    ("chat/completions", {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
    ("chat/completions", {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (
        "chat/completions",
        {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ("chat/completions", {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
    ("chat/completions", {"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
    ("embeddings", {"input": ""}, "input"),
    ("embeddings", {"input": [999]}, "input"),
    ("embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ("embeddings", {"input": ["x"] * 65}, "input"),
]


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    """The error, whose shape is OpenAI's and which says nothing about this machine."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == status
    assert error["message"] and len(response.content) < 2000
    assert str(Path.home()) not in error["message"] and "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(("path", "fields", "param"), BAD_FIELDS)
def test_each_bad_field_is_named(serve: Any, path: str, fields: dict[str, Any], param: str | None) -> None:
    served = serve()
    error = refused(served.post(f"/v1/{path}", fields))
    assert error["param"] == param, error
    # the server still works, and nothing is left of it
    assert served.complete().status_code == 200
    assert served.service.wait_idle()


def test_an_embedding_waits_for_room_like_others(serve: Any) -> None:
    served = serve(max_queue=1)
    inputs = {"input": ["x", "y"]}
    assert served.post("/v1/embeddings", inputs).status_code == 200
    assert served.service.wait_idle()
    served.service.max_queue = 0
    refused(served.post("/v1/embeddings", inputs), 429)


BODIES = [b"", b"nonsense", b"[1]", b"3", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}']
BODIES += [b'{"prompt": NaN}', b'{"prompt": "x"']


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
def test_bodies_that_are_no_objects(serve: Any, path: str, body: bytes) -> None:
    refused(serve().client.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonish", ""])
def test_bodies_of_another_type(serve: Any, kind: str) -> None:
    body = json.dumps({"prompt": "x"})
    refused(serve().client.post("/v1/completions", content=body, headers={"content-type": kind}), 415)


def test_numbers_that_are_infinite(serve: Any) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"prompt": "x", "temperature": 1e999}'
    refused(serve().client.post("/v1/completions", content=body, headers=headers))


def test_a_charset_is_no_other_type(serve: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert serve().client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers).status_code == 200


def test_too_much_for_the_context(serve: Any) -> None:
    served = serve()
    for fields in (
        {"prompt": "x" * 513},
        {"prompt": "x" * 512},
        {"prompt": [5] * 600},
        {"prompt": "x", "max_tokens": 512},
    ):
        message = refused(served.complete(**fields))["message"]
        assert "This model's maximum context length is 512 tokens" in message
    refused(served.chat("x" * 600))
    # the tokenizer need not read what cannot fit
    assert "at least" in refused(served.complete("x" * 100_000))["message"]
    assert served.complete("x" * 496, max_tokens=16).status_code == 200


def test_a_servers_own_limit_of_prompts(serve: Any) -> None:
    served = serve(max_prompt_tokens=8)
    assert "maximum prompt length is 8" in refused(served.complete("x" * 9))["message"]
    assert served.complete("x" * 8).status_code == 200


def test_bodies_beyond_the_limit_are_not_read(serve: Any) -> None:
    served = serve(max_body_bytes=1000)
    refused(served.complete("x" * 1000), 413)
    read = []

    def pieces() -> Any:
        for number in range(100):
            read.append(number)
            yield b" " * 100

    headers = {"content-type": "application/json"}
    refused(served.client.post("/v1/completions", content=pieces(), headers=headers), 413)
    assert served.complete("x" * 100).status_code == 200


def test_other_models_are_not_here(serve: Any) -> None:
    served = serve()
    assert "`gpt-9` does not exist" in refused(served.complete(model="gpt-9"), 404)["message"]
    assert served.complete(model="tiny").status_code == 200
    refused(served.client.get("/v1/models/gpt-9"), 404)
    assert served.client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_unknown_paths_and_methods(serve: Any) -> None:
    served = serve()
    refused(served.client.get("/v1/nothing"), 404)
    response = served.client.get("/v1/completions")
    refused(response, 405)
    assert "POST" in response.headers["allow"]


def test_unknown_fields_are_logged_once_by_name(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = serve()
    with caplog.at_level(logging.WARNING, "accel.server"):
        for _ in range(3):
            assert served.complete(user="someone private", store=True, best_of=1).status_code == 200
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and any("'user'" in line for line in said) and any("'store'" in line for line in said)
    assert "private" not in caplog.text


def test_a_full_queue_is_429_before_the_prompt_is_read(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(max_queue=3)
    asked: list[str] = []
    monkeypatch.setattr("accel.server.prompts.Prompts.text", lambda *_, **__: asked.append("text"))
    response = served.complete("x", n=4)
    assert refused(response, 429)["type"] == "rate_limit_error" and response.headers["retry-after"] == "3"
    refused(served.complete(["x"] * 4), 429)
    assert not asked
    assert served.service.wait_idle()


def test_a_closed_service_is_503(serve: Any) -> None:
    served = serve()
    served.service.close()
    refused(served.complete(), 503)


def test_a_dead_engine_is_503(serve: Any) -> None:
    served = serve()
    assert served.client.get("/health").status_code == 200
    served.service.dead = RuntimeError("out of memory")
    refused(served.client.get("/health"), 503)
    refused(served.complete(), 503)


def test_what_the_engine_refuses_is_400_without_folders(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()

    def submit(*_: Any) -> int:
        raise OptionError("draft_length=99: see /some/where/else/file.json, or https://example.com/a/b")

    monkeypatch.setattr(served.service, "submit", submit)
    message = refused(served.complete())["message"]
    assert message == "draft_length=99: see file.json, or https://example.com/a/b"
    refused(served.complete(stream=True))
    assert served.service.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_at_once_is_500_and_says_nothing(serve: Any, stream: bool) -> None:
    served = serve(fail_after=0)
    error = refused(served.complete(stream=stream), 500)
    assert "broke" not in error["message"]


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(serve: Any) -> None:
    served = serve("abcdef", fail_after=2, error=OptionError("this is too much"))
    *chunks, last = served.events(served.complete(stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert last["error"]["message"] == "this is too much" and last["error"]["code"] == 400
    assert refused(served.complete())["message"] == "this is too much"


KEY = {"Authorization": "Bearer right"}
PATHS = ["/v1/models", "/version", "/metrics", "/openapi.json", "/nothing"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}])
def test_keys_are_asked_for_everywhere(serve: Any, headers: dict[str, str]) -> None:
    served = serve(api_keys=frozenset({"right", "other"}))
    for path in PATHS:
        response = served.client.get(path, headers=headers)
        assert refused(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
        refused(served.client.post(path, json={"prompt": "x"}, headers=headers), 401)
    assert served.client.get("/health", headers=headers).status_code == 200
    assert served.client.get("/v1/models", headers=KEY).status_code == 200
    assert served.client.get("/v1/models", headers={"Authorization": "bearer other"}).status_code == 200


def test_other_pages_may_not_ask_unless_they_are_named(serve: Any) -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in serve().client.options("/v1/completions", headers=ask).headers
    served = serve(cors_origins=("https://page.example",), api_keys=frozenset({"right"}))
    allowed = served.client.options("/v1/completions", headers=ask).headers
    assert allowed["access-control-allow-origin"] == "https://page.example"
    other = served.client.get("/health", headers={"Origin": "https://other.example"}).headers
    assert "access-control-allow-origin" not in other


def test_every_answer_has_a_name(serve: Any) -> None:
    served = serve()
    assert served.client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = served.client.get("/nothing", headers={"X-Request-Id": "two words"}).headers["x-request-id"]
    assert made != "two words" and len(made) == 32
