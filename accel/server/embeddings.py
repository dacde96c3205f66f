"""Embeddings: the engine's vectors, as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from accel.engine.service import Service
from accel.server.errors import ApiError
from accel.server.generation import check_alive, reserve
from accel.server.preparing import Preparer
from accel.server.protocol import EmbeddingRequest
from accel.server.settings import ServerSettings


async def embeddings(
    service: Service, preparer: Preparer, settings: ServerSettings, request: EmbeddingRequest
) -> dict[str, Any]:
    """The response's body."""
    if request.dimensions is not None:
        raise ApiError(
            "dimensions is not supported by this server: vectors are as wide as the model", param="dimensions"
        )
    count = preparer.prompts.count(request.input)
    if count > settings.max_prompts:
        raise ApiError(f"{count} inputs: at most {settings.max_prompts} are allowed here", param="input")
    special = request.add_special_tokens is not False
    # its inputs are read one after the other, so that it takes the room of one
    (ticket,) = reserve(service, [1])
    try:
        prompts = await asyncio.to_thread(preparer.prompts.read, request.input, [], special=special, param="input")
        vectors = await _embedded(service, prompts)
    finally:
        ticket.release()
    tokens = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, request.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": settings.model_name, "usage": usage}


async def _embedded(service: Service, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    loop = asyncio.get_running_loop()
    result: asyncio.Future[list[list[float]]] = loop.create_future()

    def settle(found: list[list[float]] | Exception) -> None:
        if result.done():
            return
        if isinstance(found, Exception):
            result.set_exception(found)
        else:
            result.set_result(found)

    def on_event(found: list[list[float]] | Exception) -> None:
        try:
            loop.call_soon_threadsafe(settle, found)
        except RuntimeError:
            # the loop is closed, and with it everybody who could want to know
            pass

    service.embed(prompts, on_event)
    while not result.done():
        await asyncio.wait({result}, timeout=1.0)
        check_alive(service)
    return result.result()


def _shown(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return list(vector)
    # little-endian fp32, which OpenAI's clients ask for when their caller says nothing
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
