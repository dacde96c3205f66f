"""Calls that must end in time whatever the other side does: tasks of one event loop, and threads that are left alone.

A blocking socket cannot be given up: each byte that drips in starts its timeout anew. A task of an event loop can be
cancelled wherever it waits. What is no task (a database, a model) goes on in its thread, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Result = TypeVar("Result")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_locks: WeakKeyDictionary[object, threading.Lock] = WeakKeyDictionary()


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


def within(call: Callable[[], Result], seconds: float) -> Result:
    """What ``call`` gives, in a thread of its own; TimeoutError after ``seconds``, and it goes on unheard."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="accel-cascade-call", daemon=True).start()
    return future.result(seconds)


def lock_of(model: object) -> threading.Lock:
    """The one lock of a model on this machine: who generates or embeds with it holds it meanwhile, its tokenizer's too.

    Neither can be used by two threads at once: one cuts texts where the other wants them whole, say.
    """
    with _lock:
        return _locks.setdefault(model, threading.Lock())


def current() -> asyncio.AbstractEventLoop:
    """The loop; started when it is first needed, and again in a process that was forked."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="accel-cascade", daemon=True).start()
        return _loop


def _forget() -> None:
    """In a process that was forked: the loop's thread did not come along, nor one that may have held the lock."""
    global _lock, _loop, _locks
    _lock, _loop, _locks = threading.Lock(), None, WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
