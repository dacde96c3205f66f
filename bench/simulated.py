"""A simulated teacher: an OpenAI-compatible endpoint on this machine that answers by a rule and errs at a known rate.

What it says comes from a program that knows the right answer, not from a model. So it shows what a cascade costs and
gains with a teacher of a stated accuracy, and nothing about any model's accuracy or speed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from accel.errors import OptionError, first_line
from accel.methods.cascade.answerer import check_messages

Conversation = list[dict[str, str]]
MOST_SAMPLES = 128


class SimulatedTeacher:
    """A context in which ``url`` answers chat completions.

    ``policy``: what is right to say. With chance 1 − ``accuracy`` it is ``mistake`` that speaks: the digest of the
    seed, the messages and the sample's number decides, so that the same question has the same answers. ``count``:
    tokens of a text, for ``usage``: the contents of the messages, and those of all samples. ``asked``: how many
    requests were answered. Temperature, limits and stop texts are taken, and change nothing.
    """

    model = "simulated-teacher"

    def __init__(
        self,
        policy: Callable[[Conversation], str],
        mistake: Callable[[Conversation], str],
        count: Callable[[str], int],
        *,
        accuracy: float = 1.0,
        seed: int = 0,
    ) -> None:
        if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
            raise OptionError(f"accuracy={accuracy!r}: the share of answers that are right, in 0..1")
        self.policy, self.mistake, self.count = policy, mistake, count
        self.accuracy, self.seed = accuracy, seed
        self.asked = 0
        self.url = ""
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SimulatedTeacher:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None and self._thread is not None, "entered before"
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def errs(self, messages: Conversation, number: int = 0) -> bool:
        """Whether sample ``number`` of an answer is a mistake."""
        said = json.dumps([self.seed, number, [[each["role"], each["content"]] for each in messages]])
        drawn = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big")
        return drawn >= self.accuracy * 2**64

    def answer(self, body: Any) -> dict[str, Any]:
        """The completion for a request's body; raises ``OptionError`` where it asks for what cannot be answered."""
        messages, n = _question(body, self.model)
        said = [self.mistake(messages) if self.errs(messages, number) else self.policy(messages) for number in range(n)]
        read, written = sum(self.count(each["content"]) for each in messages), sum(map(self.count, said))
        with self._lock:
            self.asked += 1
            asked = self.asked
        return {
            "id": f"simulated-{asked}",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [
                {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                for index, text in enumerate(said)
            ],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        }


def _question(body: Any, model: str) -> tuple[Conversation, int]:
    """The messages of a request and how many samples it asks for."""
    if not isinstance(body, dict):
        raise OptionError("the body must be a JSON object")
    if body.get("model") != model:
        raise OptionError(f"model={body.get('model')!r}: this endpoint serves {model!r}")
    check_messages(body.get("messages", ()))
    n = body.get("n", 1)
    if type(n) is not int or not 1 <= n <= MOST_SAMPLES:
        raise OptionError(f"n={n!r}: must be a whole number in 1..{MOST_SAMPLES}")
    if body.get("stream"):
        raise OptionError("stream=true: this endpoint gives whole answers only")
    return [{"role": each["role"], "content": each["content"]} for each in body["messages"]], n


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, teacher: SimulatedTeacher) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.teacher = teacher
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Connections too: clients keep them open, and their threads would go on answering."""
        super().server_close()
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that gave up, as it may."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # an answer is one write: in two, the second waits for the client to acknowledge the first
    wbufsize = -1

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            return self._refuse(400, "a request needs a Content-Length")
        data = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self._refuse(404, f"{self.path}: only /v1/chat/completions is here")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return self._refuse(400, "the body is no JSON")
        try:
            return self._send(200, self.server.teacher.answer(body))
        except OptionError as error:
            return self._refuse(400, str(error))
        except Exception as error:
            # a policy is anybody's program: whoever asked is told, where a thread would only end
            return self._refuse(500, f"{type(error).__name__}: {first_line(error)}", "server_error")

    def do_GET(self) -> None:
        self._refuse(404, "only POST /v1/chat/completions is here")

    def log_message(self, *_: object) -> None:
        """Nothing: whoever asks counts."""

    def _refuse(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
