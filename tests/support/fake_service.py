"""A service without a model, and as a program a server of it: `python fake_service.py PORT SHUTDOWN_TIMEOUT LOADING`.

Imports no torch, so that a test of signals does not wait for it. ``GET /slow`` answers a letter each twentieth of a
second, then what became of it: "stop" or "abort". ``/flood`` sends more than a client takes that does not read.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any


class FakeService:
    """What accel.engine.service.Service offers to metrics and to the end of a server."""

    def __init__(self, now: Any = None) -> None:
        self.now = now
        self.failure: BaseException | None = None
        self.running = 0
        # what runs ends as if it had been generated, or is aborted
        self.finished, self.aborted = threading.Event(), threading.Event()
        self.closed: list[float] = []

    def gauges(self) -> Any:
        return self.now

    def close(self, drain: float = 0.0) -> None:
        self.closed.append(drain)
        until = time.monotonic() + drain
        while self.running and not self.aborted.is_set() and time.monotonic() < until:
            time.sleep(0.01)
        self.aborted.set()


def app_of(service: FakeService) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def say(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/finish":
            service.finished.set()
        if scope["path"] == "/block":
            # no await: nothing else runs on the loop
            time.sleep(60)
        if scope["path"] == "/slow":
            service.running += 1
            while not (service.finished.is_set() or service.aborted.is_set()):
                await say("x")
                await asyncio.sleep(0.05)
            service.running -= 1
            await say("stop" if service.finished.is_set() else "abort")
        while scope["path"] == "/flood" and not service.aborted.is_set():
            await say("x" * 2**20)
        await say("", more=False)

    return app


def main(port: str, timeout: str, loading: str) -> None:
    from accel.server.run import Loaded, run

    def load() -> Loaded:
        if loading == "fails":
            raise ValueError("no such model")
        time.sleep(float(loading))
        service: Any = FakeService()
        return Loaded(app_of(service), service)

    def ready(url: str) -> None:
        print("ready", url, flush=True)

    run(load, host="127.0.0.1", port=int(port), shutdown_timeout=float(timeout), on_ready=ready)
    print("over", threading.active_count(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
