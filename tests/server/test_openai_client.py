"""OpenAI's own client, sync and async, over a socket: the calls that its documentation shows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_server import listening

TEXT = "Hello wörld 🎉"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(serve: Any) -> Iterator[openai.OpenAI]:
    with listening(serve(TEXT, api_keys=frozenset({"right"})).app) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0, timeout=20) as client:
            yield client


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=2, n=2)
    assert [choice.text for choice in answer.choices] == [TEXT, TEXT]
    assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.top_logprobs[0]) == 2
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, seed=1)
    assert answer.choices[0].message.content == TEXT and answer.usage is not None
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    extra = {"top_k": 5, "accel": {"stats": True}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
    assert answer.model_extra is not None and answer.model_extra["accel"]["method"] == "speculative"


def test_streams_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options=options)
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert last.usage is not None and last.usage.completion_tokens == len(TEXT.encode()) + 1
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as helped:
        assert helped.get_final_completion().choices[0].message.content == TEXT


def test_async(client: openai.OpenAI) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="right", max_retries=0) as other:
            answers = [other.chat.completions.create(model="tiny", messages=MESSAGES) for _ in range(4)]
            said = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*answers)]
            stream = await other.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [*said, "".join(parts)]

    assert asyncio.run(talk()) == [TEXT] * 5


def test_embeddings_and_models(client: openai.OpenAI) -> None:
    # the client asks for base64 by itself
    vectors = client.embeddings.create(model="tiny", input=["ab", "c"]).data
    assert vectors[0].embedding == pytest.approx([0.6, 0.8]) and vectors[1].embedding == pytest.approx([0.6, -0.8])
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "accel"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", logprobs=21)
    assert bad.value.param == "logprobs" and "at most 20" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=5).choices[0].text == "Hello"


def test_an_error_in_a_stream_is_raised(serve: Any) -> None:
    with listening(serve(TEXT, fail_after=2).app) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="failed on this request"):
                list(stream)
