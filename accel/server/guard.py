"""In front of all routes: who may ask, and the name that a request has in the logs."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accel.server.errors import ApiError

_REQUEST_ID = re.compile(rb"[\w.-]{1,128}")
# what a load balancer asks, which has no key
OPEN = "/health"


class Guard:
    """ASGI middleware: API keys over everything but /health, and x-request-id on every answer."""

    def __init__(self, app: ASGIApp, api_keys: frozenset[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in sorted(api_keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        if scope["path"] == OPEN or self._allowed(headers.get(b"authorization", b"")):
            await self._app(scope, receive, named)
            return
        refused = ApiError(
            "no valid API key: send the header Authorization: Bearer KEY",
            status=401,
            # the body is not read
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        await refused.response()(scope, receive, named)

    def _allowed(self, authorization: bytes) -> bool:
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(b" ")
        # all of them, each in constant time: how long it takes tells nothing
        matches = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
