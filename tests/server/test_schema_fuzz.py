"""Requests made from the OpenAPI document, right and wrong ones: none of them is answered with a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from hypothesis import HealthCheck, Phase, settings
from schemathesis.generation import GenerationMode
from scripted_service import ScriptedService

import accel
from accel.server.app import create_app
from accel.server.settings import ServerSettings

EXAMPLES = 25


@pytest.fixture(scope="module")
def document() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = accel.Model(byte_llama(max_position_embeddings=256), tokenizer)
    service = ScriptedService(lambda job, index: [*job.prompt, 0], chunk=100)
    app = create_app(service, model, ServerSettings("tiny"))
    found = schemathesis.openapi.from_asgi("/openapi.json", app)
    found.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    yield found
    assert service.wait_idle()
    service.close()


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
    derandomize=True,
)
def test_no_request_breaks_the_server(case: Any) -> None:
    response = case.call()
    # where there are no figures, their page is not there
    assert response.status_code < 500, response.text
