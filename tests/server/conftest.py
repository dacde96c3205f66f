"""An app over a scripted service and a tokenizer of bytes, so that what a model would say is a string in the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from scripted_service import Script, ScriptedService
from starlette.testclient import TestClient

import accel
from accel.engine.jobs import Job
from accel.server.app import create_app
from accel.server.settings import ServerSettings

CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = 0


@pytest.fixture(scope="session")
def byte_model() -> accel.Model:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return accel.Model(byte_llama(max_position_embeddings=CONTEXT), tokenizer)


@dataclass
class Served:
    """An app, the service behind it and a client in front."""

    app: Any
    service: ScriptedService
    client: TestClient
    tokenizer: Any

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.client.post(path, json=body, headers=headers)

    def complete(self, prompt: Any = "Hello", **fields: Any) -> Any:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def chat(self, message: str = "Hello", **fields: Any) -> Any:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": message}], **fields})

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @staticmethod
    def events(response: Any) -> list[dict[str, Any]]:
        """The stream's events; it must end as it should."""
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]" and lines.count("[DONE]") == 1
        return [json.loads(line) for line in lines[:-1]]


Serve = Callable[..., Served]


@pytest.fixture
def serve(byte_model: accel.Model) -> Iterator[Serve]:
    """``serve("text")``: an app whose model says that and ends; the rest is for the service and the settings."""
    made: list[ScriptedService] = []

    def start(said: str | Script = "Hi there", *, metrics: Any = None, **choices: Any) -> Served:
        names = {"chunk", "pace", "max_queue", "fail_after", "error"}
        about_service = {name: choices.pop(name) for name in names & set(choices)}
        tokenizer = byte_model.tokenizer

        def script(job: Job, index: int) -> list[int]:
            return [*tokenizer(said)["input_ids"], END]

        service = ScriptedService(said if callable(said) else script, **about_service)
        made.append(service)
        app = create_app(service, byte_model, ServerSettings("tiny", **choices), metrics)
        return Served(app, service, TestClient(app), tokenizer)

    yield start
    for service in made:
        service.close()
