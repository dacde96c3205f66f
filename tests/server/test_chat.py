"""/v1/chat/completions: templates, roles, streams, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

TEXT = "Hello wörld 🎉"


def test_the_answer(serve: Any) -> None:
    served = serve(TEXT)
    body = served.chat("Hi").json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    (job,) = served.service.jobs
    assert served.tokenizer.decode(job.prompt) == "<user>Hi\n<assistant>"
    assert body["object"] == "chat.completion" and body["usage"]["prompt_tokens"] == len(job.prompt)
    # without a limit of its own an answer may fill the context
    assert job.max_new_tokens == 512 - len(job.prompt)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_stream_is_the_whole(serve: Any, chunk: int) -> None:
    served = serve(TEXT, chunk=chunk)
    whole = served.chat(logprobs=True, top_logprobs=2, n=2).json()["choices"]
    events = served.events(served.chat(logprobs=True, top_logprobs=2, n=2, stream=True))
    for index in (0, 1):
        choices = [each for event in events for each in event["choices"] if each["index"] == index]
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
        content = [each for choice in choices if choice["logprobs"] for each in choice["logprobs"]["content"]]
        assert content == whole[index]["logprobs"]["content"]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1


def test_logprobs_have_the_bytes_of_half_characters(serve: Any) -> None:
    content = serve("é").chat(logprobs=True, top_logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == "é"
    assert all(len(each["top_logprobs"]) == 1 for each in content)


def test_max_completion_tokens_is_max_tokens(serve: Any) -> None:
    served = serve(TEXT)
    for name in ("max_tokens", "max_completion_tokens"):
        choice = served.chat(**{name: 3}).json()["choices"][0]
        assert choice["message"]["content"] == "Hel" and choice["finish_reason"] == "length"


MESSAGES: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "So"},
]


def test_roles_and_parts_reach_the_template(serve: Any) -> None:
    served = serve(TEXT)
    served.post("/v1/chat/completions", {"messages": MESSAGES})
    rendered = "<system>Be brief.\n<user>ab\n<assistant>So\n<assistant>"
    assert served.tokenizer.decode(served.service.jobs[0].prompt) == rendered


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"add_generation_prompt": False}, "<assistant>So\n"),
        ({"continue_final_message": True}, "<assistant>So"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<assistant>So"),
    ],
)
def test_how_a_prompt_ends(serve: Any, fields: dict[str, bool], end: str) -> None:
    served = serve(TEXT)
    assert served.post("/v1/chat/completions", {"messages": MESSAGES, **fields}).status_code == 200
    assert served.tokenizer.decode(served.service.jobs[0].prompt) == f"<system>Be brief.\n<user>ab\n{end}"


def test_echo_repeats_what_is_continued(serve: Any) -> None:
    served = serve(" it is")
    fields = {"messages": MESSAGES, "continue_final_message": True, "echo": True}
    whole = served.post("/v1/chat/completions", fields).json()
    assert whole["choices"][0]["message"]["content"] == "So it is"
    events = served.events(served.post("/v1/chat/completions", fields | {"stream": True}))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "So it is"


def test_a_stream_of_nothing_has_a_role_and_an_end(serve: Any) -> None:
    served = serve("")
    events = served.events(served.chat(stream=True))
    assert [event["choices"][0]["delta"] for event in events] == [{"role": "assistant", "content": ""}, {}]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert served.chat().json()["choices"][0]["message"]["content"] == ""
