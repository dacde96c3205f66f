"""Requests made from the OpenAPI document, right and wrong ones: none of them is answered with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from scripted_service import ScriptedService
from starlette.testclient import TestClient

import accel
from accel.server.app import create_app
from accel.server.settings import ServerSettings

EXAMPLES = 25
BODIES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Any, Any, ScriptedService]]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = accel.Model(byte_llama(max_position_embeddings=256), tokenizer)
    service = ScriptedService(lambda job, index: [*job.prompt, 0], chunk=100, max_queue=10_000)
    app = create_app(service, model, ServerSettings("tiny"))
    yield schemathesis.openapi.from_asgi("/openapi.json", app), TestClient(app), service
    service.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", BODIES)
def test_no_request_breaks_the_server(fuzzed: Any, path: str, mode: GenerationMode) -> None:
    # schemathesis' own plugin lags behind pytest: hypothesis draws from its strategies directly
    document, client, service = fuzzed
    statuses: list[int] = []

    @settings(max_examples=EXAMPLES, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(document[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        assert response.status_code < 500, response.text

    ask()
    assert len(statuses) >= EXAMPLES // 2
    print(path, mode, __import__("collections").Counter(statuses))
    assert service.wait_idle()
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
