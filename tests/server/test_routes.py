"""Embeddings, tokens, models, metrics: the routes that write no text."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest

import accel


def test_models_have_an_id_and_a_root(serve: Any) -> None:
    (card,) = serve(model_root="org/tiny").client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["root"] == "org/tiny" and card["max_model_len"] == 512
    assert serve().client.get("/v1/models").json()["data"][0]["root"] == "tiny"


def test_version(serve: Any) -> None:
    assert serve().client.get("/version").json() == {"version": accel.__version__}


def test_tokens_and_back(serve: Any) -> None:
    served = serve()
    text = "wörld 🎉"
    body = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == served.ids(text) and body["count"] == len(body["tokens"]) and body["max_model_len"] == 512
    assert len(body["token_strs"]) == body["count"]
    assert served.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": text}
    assert served.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert served.post("/detokenize", {"tokens": [257]}).status_code == 400


def test_tokens_of_a_conversation_are_those_of_its_answer(serve: Any) -> None:
    served = serve()
    tokens = served.post("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}).json()["tokens"]
    served.chat("Hello")
    assert tokens == served.service.jobs[0].prompt
    # a conversation alone is no text
    assert served.post("/v1/completions", {"messages": []}).status_code == 400


@pytest.mark.parametrize("given", ["abc", ["abc", "d"], [5, 6], [[5, 6], [7]]])
def test_embeddings(serve: Any, given: Any) -> None:
    served = serve()
    body = served.post("/v1/embeddings", {"input": given, "encoding_format": "float"}).json()
    tokens = served.service.embedded
    assert [each["index"] for each in body["data"]] == list(range(len(tokens)))
    assert body["data"][0]["embedding"] == [0.6, 0.8 * (-1) ** len(tokens[0])]
    assert body["usage"] == {"prompt_tokens": sum(map(len, tokens)), "total_tokens": sum(map(len, tokens))}
    coded = served.post("/v1/embeddings", {"input": given, "encoding_format": "base64"}).json()
    read = [struct.unpack("<2f", base64.b64decode(each["embedding"])) for each in coded["data"]]
    assert read[0] == pytest.approx(body["data"][0]["embedding"])


class Counted:
    """Metrics that remember what they were told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def observe(self, **figures: Any) -> None:
        self.told.append(figures)

    def render(self) -> tuple[bytes, str]:
        return b"figures 1\n", "text/plain; version=0.0.4"


def test_every_continuation_is_counted_once(serve: Any) -> None:
    metrics = Counted()
    served = serve("abcdef", metrics=metrics, pace=0.01)
    served.complete("xyz", n=2, stop="c")
    served.chat("x", stream=True, max_tokens=2)
    first, second, third = metrics.told
    for each in (first, second):
        assert (each["prompt_tokens"], each["generated_tokens"], each["finish"]) == (3, 3, "stop")
        assert len(each["inter_token"]) == 2 and 0 < each["ttft"] < each["e2e"]
        assert each["e2e"] == pytest.approx(each["ttft"] + sum(each["inter_token"]), abs=0.05)
    assert third["finish"] == "length" and third["generated_tokens"] == 2
    broken = serve("abc", metrics=metrics, fail_after=1)
    broken.complete()
    assert metrics.told[3]["finish"] == "error" and metrics.told[3]["generated_tokens"] == 1


def test_the_page_of_figures(serve: Any) -> None:
    response = serve(metrics=Counted()).client.get("/metrics")
    assert response.text == "figures 1\n" and response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert serve().client.get("/metrics").status_code == 404


def test_the_schema_describes_every_body(serve: Any) -> None:
    document = serve().client.get("/openapi.json").json()
    posts = {path: each["post"] for path, each in document["paths"].items() if "post" in each}
    assert set(posts) == {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"}
    schemas = document["components"]["schemas"]
    for post in posts.values():
        schema = post["requestBody"]["content"]["application/json"]["schema"]
        for ref in schema.get("anyOf", [schema]):
            assert ref["$ref"].removeprefix("#/components/schemas/") in schemas
        assert {"400", "401", "413", "415", "429", "503"} <= set(post["responses"])
    assert {"n", "seed", "stop", "structured_outputs", "accel", "prompt"} <= set(
        schemas["CompletionRequest"]["properties"]
    )
