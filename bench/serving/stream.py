"""A streamed answer as it arrives: bytes → events → when each chunk came, what it said, and how it ended.

Knows nothing of connections. Times are of `vllm bench serve`: every chunk with choices counts, with or without text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

DONE = b"[DONE]"
# of one event; a server that sends no line end must not fill the memory
MAX_EVENT_BYTES = 16 << 20
MAX_MESSAGE = 300


class BrokenStreamError(Exception):
    """A stream that is no answer; the message says why."""


@dataclass
class Outcome:
    """One request. Seconds count from ``started`` (the moment it was sent); ``gaps`` lie between its chunks.

    ``ttft``: to the first chunk, ``ttft_text``: to the first that has text, ``latency``: to the last chunk.
    ``output_tokens``: what the server said, else ``text_chunks``, and ``counted`` is true. ``error``: why it failed.
    ``queued``: how long it waited here for its turn.
    """

    started: float = 0.0
    queued: float = 0.0
    ttft: float = 0.0
    ttft_text: float | None = None
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    text_chunks: int = 0
    counted: bool = False
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None


class Events:
    """Server-sent events out of pieces of any size; comments, names and ids are passed over."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """The data of every event that ``part`` completes."""
        found: list[bytes] = []
        *lines, self._tail = (self._tail + part).split(b"\n")
        if len(self._tail) > MAX_EVENT_BYTES:
            raise BrokenStreamError(f"an event of more than {MAX_EVENT_BYTES >> 20} MB")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif not line:
                found += self._end()
        return found

    def close(self) -> list[bytes]:
        """The event that the stream's end cut off before its empty line."""
        found = self.feed(b"\n")
        return found + self._end()

    def _end(self) -> list[bytes]:
        data, self._data = self._data, []
        return [b"\n".join(data)] if data else []


class Reading:
    """What the chunks of one answer add up to. ``take`` is called with every event and when it arrived."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.done = False
        self._last: float | None = None
        self._text: list[str] = []

    def take(self, data: bytes, now: float) -> None:
        """One event; raises ``BrokenStreamError`` where it reports an error or is no chunk."""
        if data == DONE:
            self.done = True
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise BrokenStreamError(f"an event that is no JSON: {shortened(data.decode(errors='replace'))}") from None
        if not isinstance(chunk, dict) or chunk.get("error") is not None or chunk.get("object") == "error":
            raise BrokenStreamError(f"the server reported: {said(chunk)}")
        try:
            if choices := chunk.get("choices"):
                self._choice(choices[0], now)
            # some servers report it in the last chunk with choices, others in one of its own
            if usage := chunk.get("usage"):
                self.outcome.prompt_tokens = usage.get("prompt_tokens") or 0
                self.outcome.output_tokens = usage.get("completion_tokens") or 0
        except (AttributeError, KeyError, TypeError) as error:
            raise BrokenStreamError(f"a chunk of another shape: {shortened(data.decode(errors='replace'))}") from error

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        outcome = self.outcome
        since = now - outcome.started
        if self._last is None:
            outcome.ttft = since
        else:
            outcome.gaps.append(now - self._last)
        self._last = now
        outcome.latency = since
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")
        if text:
            if outcome.ttft_text is None:
                outcome.ttft_text = since
            outcome.text_chunks += 1
            self._text.append(text)
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason

    def end(self) -> None:
        """The stream is over: was it an answer?"""
        outcome = self.outcome
        outcome.text = "".join(self._text)
        if self._last is None:
            raise BrokenStreamError("the stream ended without a chunk")
        if not self.done and outcome.finish_reason is None:
            raise BrokenStreamError(
                f"the stream ended after {len(outcome.gaps) + 1} chunks, with neither a finish_reason nor [DONE]"
            )
        if not outcome.output_tokens:
            outcome.output_tokens, outcome.counted = outcome.text_chunks, True


def said(body: Any) -> str:
    """What an error's body says, in one line: OpenAI's shape, FastAPI's, or whatever it is."""
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", body.get("message", body)))
        body = error.get("message", error) if isinstance(error, dict) else error
    return shortened(body if isinstance(body, str) else json.dumps(body, ensure_ascii=False))


def shortened(text: str) -> str:
    """One line of at most ``MAX_MESSAGE`` letters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"
