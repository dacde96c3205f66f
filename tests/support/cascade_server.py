"""An OpenAI-compatible server in a thread that answers as it is told to: rightly, wrongly, slowly or not at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# what a server does with one request: writes to the handler, given the request's body
Behaviour = Callable[["Handler", dict[str, Any]], None]

USAGE = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 40}}


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            script = self.server.script
            act = script.pop(0) if len(script) > 1 else script[0]
        try:
            act(self, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *script: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        # the last one is repeated
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        # set when the server closes: what hangs lets go
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(*script: Behaviour) -> Iterator[FaultyServer]:
    server = FaultyServer(*script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def completion(*texts: str | None, **changes: Any) -> dict[str, Any]:
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for n, text in enumerate(texts)
    ]
    return {"object": "chat.completion", "model": "served-model", "choices": choices, "usage": USAGE} | changes


def says(*texts: str | None, **changes: Any) -> Behaviour:
    """These choices, whatever was asked."""
    return lambda handler, _: handler.answer(200, json.dumps(completion(*texts, **changes)).encode())


def as_asked(text: str) -> Behaviour:
    """As many choices as were asked for."""
    return lambda handler, body: says(*[text] * body.get("n", 1))(handler, body)


def fails(status: int, message: str = "not now", **headers: str) -> Behaviour:
    data = json.dumps({"error": {"message": message, "type": "x", "code": status}}).encode()
    return lambda handler, _: handler.answer(status, data, **headers)


def sends(data: bytes, status: int = 200, **headers: str) -> Behaviour:
    return lambda handler, _: handler.answer(status, data, **headers)


def hangs(handler: Handler, _: object) -> None:
    handler.server.closing.wait()


def hangs_up(handler: Handler, _: object) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def drips(handler: Handler, _: object) -> None:
    """An endless header, a byte at a time: every read succeeds."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    _drip(handler)


def drips_body(handler: Handler, _: object) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    _drip(handler)


def breaks_off(handler: Handler, _: object) -> None:
    """Half of an answer."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
    handler.connection.shutdown(socket.SHUT_RDWR)


def after(seconds: float, act: Behaviour) -> Behaviour:
    def late(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        act(handler, body)

    return late


def _drip(handler: Handler) -> None:
    while not handler.server.closing.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()
