"""One event loop in a thread, for calls that must end in time whatever the other side does.

A blocking socket cannot be given up: each byte that drips in starts its timeout anew. A task of an event loop can be
cancelled wherever it waits.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid = 0


def run(make: Callable[[], Coroutine[Any, Any, Result]], seconds: float) -> Result:
    """The coroutine's result, from any thread; TimeoutError after ``seconds``. An interrupted caller cancels it."""

    async def limited() -> Result:
        async with asyncio.timeout(seconds):
            return await make()

    future = asyncio.run_coroutine_threadsafe(limited(), current())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def current() -> asyncio.AbstractEventLoop:
    """The loop; started when it is first needed, and again in a process that was forked."""
    global _loop, _pid
    with _lock:
        if _loop is None or _pid != os.getpid():
            _loop, _pid = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="accel-cascade", daemon=True).start()
        return _loop
