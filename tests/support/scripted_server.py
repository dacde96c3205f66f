"""A server that speaks as it is told: requests are answered by a script of pauses and bytes, on a socket of its own.

Knows HTTP as far as a client must see it, and nothing of models.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any

EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
Step = float | bytes
# the body of a request → pauses in seconds and bytes to send; None ends the connection
Script = Callable[[dict[str, Any]], Iterable[Step | None]]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return chunked(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")


def delta(text: str | None, finish: str | None = None) -> bytes:
    """A chunk of a chat completion."""
    content = {"role": "assistant"} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": content, "finish_reason": finish}]})


def usage(prompt: int, completion: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def plain(status: int, value: Any) -> bytes:
    """A whole answer that is no stream."""
    body = json.dumps(value).encode() if not isinstance(value, bytes) else value
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answer(first: float, gap: float, count: int, prompt: int = 7) -> list[Step]:
    """``count`` tokens, one a chunk: the first after ``first`` seconds, the others after ``gap`` each."""
    steps: list[Step] = [EVENT_STREAM, first]
    for index in range(count):
        steps += [*([gap] if index else []), delta(f"t{index} ", "length" if index == count - 1 else None)]
    return [*steps, usage(prompt, count), event(b"[DONE]"), END]


class ScriptedServer:
    """A context in which ``url`` answers POST by ``script``, /v1/models with ``models`` and /metrics with ``pages``.

    ``bodies``, ``arrived`` and ``keys``: of the requests so far. ``most``: how many were under way at once.
    """

    def __init__(self, script: Script, models: Any = ("tiny",), pages: Iterable[str] = ()) -> None:
        self.script, self.pages = script, list(pages)
        self.models = {"data": [{"id": each} for each in models]}
        self.bodies: list[dict[str, Any]] = []
        self.arrived: list[float] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Awaitable[Any]) -> Any:
        async def waited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result(10)

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        if method == "GET":
            pages = self.pages
            page = plain(200, self.models) if path == "/v1/models" else plain(404, {"detail": "no"})
            if path == "/metrics" and pages:
                page = plain(200, (pages.pop(0) if len(pages) > 1 else pages[0]).encode())
            writer.write(page)
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.bodies.append(body | {"path": path})
        self.arrived.append(time.perf_counter())
        self.keys.append(headers.get("authorization"))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for step in self.script(body):
                if step is None:
                    return False
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
        finally:
            self.running -= 1
        return True
