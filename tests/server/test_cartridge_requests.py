"""Requests that name cartridges: what stands in front of their prompts, and how much of the context it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from starlette.testclient import TestClient

import accel
from accel.engine import service as engine
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.server.app import create_app
from accel.server.settings import ServerSettings

DOCUMENT = "a document of some length, in bytes. "
CONTEXT = 256


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    tokenizer, model = byte_tokenizer(), byte_llama(max_position_embeddings=CONTEXT)
    ids = tokenizer(DOCUMENT)["input_ids"]
    described = (document.describe(DOCUMENT, len(ids)),)
    whole = {"method": "whole", "exact": True, "documents": described, "template": "text"}
    cartridge = Cartridge.of("doc", document.read(model, ids), model, **whole)
    served = accel.Model(accel.attach(model, cartridge, tokenizer=tokenizer), tokenizer)
    service = engine.serve(served, max_rows=2)
    try:
        yield TestClient(create_app(service, served, ServerSettings("tiny")))
    finally:
        service.close()


def complete(client: Any, prompt: str, cartridges: list[str] | None, **fields: Any) -> Any:
    asked = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "accel": {"cartridges": cartridges}, **fields}
    return client.post("/v1/completions", json=asked)


def test_a_cartridge_stands_in_for_its_document(client: Any) -> None:
    behind = complete(client, "It says", ["doc"]).json()
    read = complete(client, DOCUMENT + "It says", []).json()
    assert behind["choices"][0]["text"] == read["choices"][0]["text"]
    assert behind["usage"]["prompt_tokens"] == len("It says")
    # the one that the model was loaded with is read where a request says nothing, and not where it wants none
    assert complete(client, "It says", None).json()["choices"][0]["text"] == behind["choices"][0]["text"]
    assert complete(client, "It says", []).json()["choices"][0]["text"] != behind["choices"][0]["text"]


def test_a_cartridge_takes_its_part_of_the_context(client: Any) -> None:
    left = CONTEXT - len(DOCUMENT) - 1
    assert complete(client, "x", ["doc"], max_tokens=left).status_code == 200
    refused = complete(client, "x", ["doc"], max_tokens=left + 1)
    assert refused.status_code == 400
    assert f"of which cartridges take {len(DOCUMENT)}" in refused.json()["error"]["message"]
    assert complete(client, "x", [], max_tokens=left + 1).status_code == 200


def test_names_alone_are_looked_up(client: Any) -> None:
    refused = complete(client, "x", ["other"]).json()["error"]
    assert refused["param"] == "accel.cartridges" and "doc" in refused["message"]
