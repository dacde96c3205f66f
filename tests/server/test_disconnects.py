"""Callers that hang up: their jobs are cancelled at once, over a real socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_server import listening

FOREVER = "abcdefgh" * 60


@pytest.fixture
def slow(serve: Any) -> Iterator[tuple[Any, str]]:
    """A server that needs about ten seconds for an answer."""
    served = serve(FOREVER, pace=0.02, max_queue=500)
    with listening(served.app) as url:
        yield served, url


def ask(client: Any, **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt="x", max_tokens=480, **fields)


def test_a_timeout_cancels_the_job(slow: Any) -> None:
    served, url = slow
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        ask(client)
    assert served.service.wait_idle(1.0) and served.service.cancelled == [1]


def test_a_stream_that_nobody_reads_on_is_cancelled(slow: Any) -> None:
    served, url = slow
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = ask(client, stream=True)
        assert next(iter(stream)).choices[0].text == "a"
        stream.close()
    assert served.service.wait_idle(1.0) and served.service.cancelled == [1]


def test_hanging_up_while_the_prompt_is_read_leaves_nothing(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served, url = slow
    reading, go_on = threading.Event(), threading.Event()

    def text(*_: Any, **__: Any) -> list[int]:
        reading.set()
        go_on.wait(10)
        return [5]

    monkeypatch.setattr("accel.server.prompts.Prompts.text", text)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        ask(client)
    assert reading.is_set()
    assert served.service.wait_idle(1.0) and not served.service.jobs
    go_on.set()
    # nothing comes of it later either
    time.sleep(0.1)
    assert not served.service.jobs


def test_an_answer_comes_after_two_hundred_timeouts(slow: Any) -> None:
    served, url = slow

    async def flood() -> float:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.5) as client:
            asked = [ask(client, stream=number % 2 == 0) for number in range(200)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, openai.AsyncStream):
                    await answer.close()
        began = time.monotonic()
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            last = await client.completions.create(model="tiny", prompt="x", max_tokens=3)
            assert last.choices[0].text == "abc"
        return time.monotonic() - began

    assert asyncio.run(flood()) < 5
    assert served.service.wait_idle(5.0)
    assert served.service.gauges().running == 0


def test_the_loop_answers_others_while_a_prompt_is_read(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = slow
    go_on = threading.Event()
    monkeypatch.setattr("accel.server.prompts.Prompts.text", lambda *_, **__: [5] * (1 + go_on.wait(10)))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=5)
    waiting = threading.Thread(target=lambda: client.completions.create(model="tiny", prompt="x", max_tokens=1))
    waiting.start()
    began = time.monotonic()
    assert client.models.list().data[0].id == "tiny"
    assert time.monotonic() - began < 4
    go_on.set()
    waiting.join(10)
    assert not waiting.is_alive()
