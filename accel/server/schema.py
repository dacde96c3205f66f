"""The OpenAPI document: bodies are read and checked by the app itself, and described from the same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from accel.server import protocol

REQUESTS: tuple[type[BaseModel], ...] = (
    protocol.ChatRequest,
    protocol.CompletionRequest,
    protocol.EmbeddingRequest,
    protocol.TokenizeText,
    protocol.TokenizeChat,
    protocol.DetokenizeRequest,
)
REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
REFUSED = {"description": "An error", "content": {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}}
# the statuses with which a request for text or numbers can be refused
REFUSALS = (400, 401, 404, 413, 415, 429, 500, 502, 503)


def described(
    handler: Callable[..., Any], models: type[BaseModel] | tuple[type[BaseModel], ...] | None = None
) -> dict[str, Any]:
    """What a route's decorator is told: its summary, its responses, and the body where it reads one."""
    about: dict[str, Any] = {"summary": (handler.__doc__ or "").strip(), "name": handler.__name__}
    about["responses"] = dict.fromkeys(REFUSALS if models else (401, 404, 503), REFUSED)
    if models is not None:
        each = models if isinstance(models, tuple) else (models,)
        refs = [{"$ref": REF.format(model=model.__name__)} for model in each]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        about["openapi_extra"] = {"requestBody": body}
    return about


def document(app: FastAPI) -> dict[str, Any]:
    """The document of ``app``, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, found = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REF)
        made.setdefault("components", {}).setdefault("schemas", {}).update({**found["$defs"], "Error": ERROR})
        app.openapi_schema = made
    return app.openapi_schema
