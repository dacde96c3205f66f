"""One exchange over HTTP: a body read within its limit, a caller who may hang up at any time, a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from accel.errors import first_line
from accel.server.errors import ApiError, api_error

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # proxies would collect the events
    (b"x-accel-buffering", b"no"),
]


class Gone(Exception):
    """Nobody waits for the answer any more."""


async def read_body(request: Request, limit: int) -> Any:
    """The request's JSON. Reads no more than ``limit`` bytes, and nothing of what is no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(f"the content type is {kind[:80]!r}: send application/json", status=415)
    too_large = ApiError(f"the body is larger than {limit} bytes", status=413, headers={"Connection": "close"})
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise Gone from None
    try:
        return from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {first_line(error)}") from None


def parsed(model: type[M], body: Any) -> M:
    """``body`` as a request; the first thing that is wrong with it is told."""
    if not isinstance(body, dict):
        raise ApiError("the body is no JSON object: send an object with the request's fields")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    places = [_place(each["loc"], body, each["type"] == "missing") for each in found]
    # of a union's alternatives the one that came furthest is the one that was meant
    alike = [number for number, place in enumerate(places) if place[: len(places[0])] == places[0]]
    chosen = max(alike, key=lambda number: len(places[number]))
    place, what = ".".join(places[chosen]), found[chosen]
    given = "" if what["type"] == "missing" else f" (given: {_short(what['input'])})"
    raise ApiError(
        f"{place + ': ' if place else ''}{what['msg'].removeprefix('Value error, ')[:500]}{given}", param=place or None
    )


def _place(where: tuple[int | str, ...], body: Any, missing: bool) -> list[str]:
    """The path to a field, without what names the alternatives of a union."""
    found = []
    for step, part in enumerate(where):
        inside = body[part] if _has(body, part) else None
        if inside is not None or _has(body, part) or (missing and step == len(where) - 1):
            found.append(str(part)[:80])
            body = inside
    return found


def _has(body: Any, part: int | str) -> bool:
    if isinstance(body, dict):
        return part in body
    return isinstance(body, list) and isinstance(part, int) and part < len(body)


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
    return shown if len(shown) <= 80 else shown[:77] + "..."


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the caller hangs up; then Gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Source(Protocol):
    """What makes an answer; ``close`` ends it when nobody waits for more."""

    def updates(self) -> AsyncIterator[Any]: ...

    def close(self) -> None: ...


class Shown(Protocol):
    """An answer as a stream shows it: chunks of an update, those behind all of them, and what heads them."""

    def chunks(self, update: Any) -> Sequence[Mapping[str, Any]]: ...

    def last(self) -> Sequence[Mapping[str, Any]]: ...

    def headers(self) -> Mapping[str, str]: ...


class EventStream(Response):
    """Server-sent events of an answer; an error before the first of them has its status."""

    media_type = "text/event-stream"

    def __init__(self, generation: Source, answer: Shown) -> None:
        super().__init__(status_code=200)
        self._generation = generation
        self._answer = answer
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(Gone):
                await unless_gone(receive, self._run(scope, receive, send))
        finally:
            self._generation.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._tell(send)
        except Exception as error:
            failed = api_error(error)
            if not self._started:
                await failed.response()(scope, receive, send)
                return
            await self._send(send, _event(failed.body()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _tell(self, send: Send) -> None:
        async for update in self._generation.updates():
            events = [_event(chunk) for chunk in self._answer.chunks(update)]
            if events:
                await self._send(send, b"".join(events))
        await self._send(send, b"".join(_event(chunk) for chunk in self._answer.last()))

    async def _send(self, send: Send, body: bytes) -> None:
        if not self._started:
            self._started = True
            known = [(name.encode(), value.encode("latin-1")) for name, value in self._answer.headers().items()]
            await send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *known]})
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
