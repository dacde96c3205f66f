"""Running the server: one process, a socket that answers while the model loads, and an end that comes in time.

Knows sockets, signals and uvicorn. Does not know what the routes are, or what the engine computes.
"""

from __future__ import annotations

import asyncio
import faulthandler
import ipaddress
import json
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.engine.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# the head of a request: names and values of its headers, and its path
MAX_HEAD_BYTES = 64 * 2**10
# seconds that answers have to leave the socket once the engine has given its last token
FLUSH_SECONDS = 2
# seconds after which a process that should have ended is ended
STUCK_SECONDS = 5.0
LOADING, CLOSING = "the model is loading", "the server is shutting down"


@dataclass(frozen=True)
class Loaded:
    """What ``load`` brings: the routes, and the engine behind them."""

    app: App
    service: Service


class Front:
    """What the socket talks to: the app once it is there; before that, and when the server ends, 503 for all."""

    def __init__(self) -> None:
        self.app: App | None = None
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # a WebSocket: refused before it is one
            await send({"type": "websocket.close", "code": 1000})
        elif _head_bytes(scope) > MAX_HEAD_BYTES:
            await _refuse(send, 431, f"the path and the headers have more than {MAX_HEAD_BYTES} bytes")
        elif self.closing and scope["path"] != "/metrics":
            await _refuse(send, 503, CLOSING)
        elif self.app is None:
            await _refuse(send, 503, LOADING)
        else:
            try:
                await self.app(scope, receive, send)
            except asyncio.CancelledError:
                # of a client that does not read, when the server ends: not worth a traceback
                if not self.closing:
                    raise


def run(
    load: Callable[[], Loaded],
    *,
    host: str,
    port: int,
    shutdown_timeout: float = 30.0,
    on_ready: Callable[[str], None] = lambda url: None,
    on_bound: Callable[[str, bool], None] = lambda url, beyond: None,
) -> None:
    """Serve until SIGTERM or SIGINT, and return when nothing of the server is left.

    ``load`` runs in a thread meanwhile; what it raises ends the server and is raised here. ``on_bound`` is told the
    URL and whether other machines may reach it, ``on_ready`` the URL again once requests are answered.
    The first signal refuses new requests and gives those under way ``shutdown_timeout`` seconds, after which they end
    with "abort"; the second aborts them at once.
    """
    listener = bind(host, port)
    url, beyond = address(listener)
    on_bound(url, beyond)
    front = Front()
    server = _Server(front, shutdown_timeout)
    loader = threading.Thread(target=server.load, args=(load, lambda: on_ready(url)), name="load", daemon=True)
    loader.start()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        server.clear()
    if loader.is_alive():
        # torch does not take it well when the interpreter ends under a thread that is inside it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if server.failure is not None:
        raise server.failure


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; who cannot have it is told why in one line."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # of a name with both, the one that clients try last would surprise
        family, kind, protocol, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(f"--host {host}: {error.strerror or error}: name an address of this machine") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        # uvicorn listens later, and until then a second server would be given the port too
        listener.listen(2048)
    except OSError as error:
        listener.close()
        what = error.strerror or error
        raise OptionError(f"cannot listen on {host}:{port}: {what}: choose another --port or --host") from None
    return listener


def address(listener: socket.socket) -> tuple[str, bool]:
    """The URL of a socket, and whether it can be reached from other machines."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}", not ipaddress.ip_address(host.partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn, which would close its socket at the first signal and die of it afterwards."""

    def __init__(self, front: Front, shutdown_timeout: float) -> None:
        settings: dict[str, Any] = {"lifespan": "off", "ws": "none", "loop": "asyncio"}
        # one parser everywhere, whose bound on the head of a request is known
        settings |= {"http": "h11", "h11_max_incomplete_event_size": MAX_HEAD_BYTES}
        settings |= {"access_log": False, "log_config": None, "server_header": False, "proxy_headers": False}
        super().__init__(uvicorn.Config(front, timeout_graceful_shutdown=FLUSH_SECONDS, **settings))
        self.failure: BaseException | None = None
        self._front = front
        self._timeout = shutdown_timeout
        self._service: Service | None = None
        self._signals = 0
        self._closer: threading.Thread | None = None
        self._hurried = False

    def load(self, load: Callable[[], Loaded], on_ready: Callable[[], None]) -> None:
        """Bring the model and let the front answer."""
        try:
            loaded = load()
        except BaseException as error:
            self.failure = error
            self.should_exit = True
            return
        self._service = loaded.service
        self._front.app = loaded.app
        if not self._signals:
            on_ready()

    def clear(self) -> None:
        """The last of it: an engine that came up while the server went down, and the watch over the end."""
        if self._service is not None:
            self._service.close(0.0)
        if self._signals:
            faulthandler.cancel_dump_traceback_later()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only noted here: uvicorn would raise the signal again at the end, and the exit code would tell of it."""
        self._signals += 1
        self._front.closing = True
        # the process ends in any case: this thread needs nothing of Python, and says where the others were
        left = (self._timeout if self._signals == 1 else 0.0) + FLUSH_SECONDS + STUCK_SECONDS
        faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or sys.stderr)

    async def on_tick(self, counter: int) -> bool:
        """Called every tenth of a second on the loop."""
        if self._signals and self._closer is None:
            self._closer = self._close(self._timeout)
        if self._signals > 1 and not self._hurried:
            self._hurried = True
            self._close(0.0)
        if self._closer is not None and not self._closer.is_alive():
            self.should_exit = True
        return await super().on_tick(counter)

    def _close(self, drain: float) -> threading.Thread:
        """Close the engine in a thread, because that waits."""
        service = self._service
        # nothing to drain while the model loads
        work = (lambda: None) if service is None else (lambda: service.close(drain))
        closer = threading.Thread(target=work, name="close", daemon=True)
        closer.start()
        return closer


def _head_bytes(scope: Scope) -> int:
    # the parser's own bound is on heads that came in parts: one that is there at once it takes
    parts = [scope["raw_path"], scope["query_string"], *(part for header in scope["headers"] for part in header)]
    return sum(map(len, parts))


async def _refuse(send: Send, status: int, message: str) -> None:
    """OpenAI's error shape. Clients that find 503 come again after a second, to whoever is at this address then."""
    kind = "service_unavailable" if status == 503 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # the body of the request is not read, and the next request should find a socket that is being closed
        (b"connection", b"close"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
