"""One OpenAI-compatible server as it is asked: its address, its model, the fields that it takes, a streamed request."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from accel.bench.serving.stream import BrokenStreamError, Events, Outcome, Reading, said, shortened
from accel.errors import AccelError, OptionError

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# a prompt that no measured one begins like: what it leaves in a prefix cache helps nobody
PROBE = "Say hello."
PROBE_TOKENS = 4
# chunks with text; more, and the server knows the limit by another name (some pass over fields that they do not know)
PROBE_CHUNKS = 8
# how long a server may keep a stream open behind its [DONE]
GRACE = 1.0
RETRY = 0.5
GET_SECONDS = 10.0
# servers close a connection that was idle for 5 s: a request must not meet that moment
KEPT = 4.0
_REFUSED = (400, 422)


class ServerError(AccelError, RuntimeError):
    """A server that does not answer as it should; the message says which and how."""


@dataclass(frozen=True)
class Ask:
    """What every request asks for. None leaves a field to the server. ``seconds``: after which one has failed."""

    endpoint: str = "chat"
    max_tokens: int = 128
    temperature: float | None = None
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise OptionError(f"endpoint={self.endpoint!r}: must be one of {', '.join(ENDPOINTS)}")
        if self.max_tokens < 1:
            raise OptionError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.temperature is not None and self.temperature < 0:
            raise OptionError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if not self.seconds > 0:
            raise OptionError(f"timeout={self.seconds}: must be more than 0 seconds")


@dataclass(frozen=True)
class Dialect:
    """How a server wants to be asked: the name of the limit, and whether it takes ``stream_options``."""

    limit: str
    usage: bool


# the first that a server takes; OpenAI's own newest models refuse the older name, transformers' server the newer one
DIALECTS = {
    "chat": (Dialect("max_completion_tokens", True), Dialect("max_tokens", True), Dialect("max_tokens", False)),
    "completions": (Dialect("max_tokens", True), Dialect("max_tokens", False)),
}


class Server:
    """``name`` at ``url`` (with or without /v1). ``connect`` before the first ``ask``; ``close`` at the end."""

    def __init__(self, name: str, url: str, ask: Ask, *, model: str | None = None, key: str | None = None) -> None:
        self.name = name
        self.base = url.rstrip("/").removesuffix("/v1")
        parsed = _parsed(self.base)
        self.ask_for = ask
        self.model = model or ""
        self.dialect = DIALECTS[ask.endpoint][0]
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        # a load is bounded by whoever drives it: a pool's own limit would be a queue inside the measured time. No proxy
        # stands between this machine and itself
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT),
            follow_redirects=False,
            trust_env=not _loopback(parsed.host),
        )
        self._url = self.base + ENDPOINTS[ask.endpoint]

    async def close(self) -> None:
        await self._client.aclose()

    async def connect(self, seconds: float) -> list[str]:
        """Wait until the server answers, at most ``seconds``; learn its model and its dialect. Returns notes."""
        last = time.monotonic() + seconds
        while True:
            try:
                # one that hangs must not outlast the limit
                async with asyncio.timeout(max(last - time.monotonic(), RETRY)):
                    return await self._introduce()
            except (httpx2.TransportError, TimeoutError, _NotReadyError) as error:
                if time.monotonic() + RETRY > last:
                    why = shortened(str(error) or type(error).__name__)
                    raise ServerError(f"{self.name} at {self.base} is not ready after {seconds:g} s: {why}") from error
            await asyncio.sleep(RETRY)

    async def _introduce(self) -> list[str]:
        if not self.model:
            self.model = await self._first_model()
        refused = ""
        for dialect in DIALECTS[self.ask_for.endpoint]:
            self.dialect = dialect
            try:
                answered = await self._probe()
            except _RefusedError as error:
                # the first word is about the fields that everybody sends
                refused = refused or str(error)
                continue
            except BrokenStreamError as error:
                raise ServerError(f"{self.name} at {self.base} gives no stream of chunks: {error}") from error
            notes = []
            if dialect != DIALECTS[self.ask_for.endpoint][0]:
                asked = f"asked for {dialect.limit}" + ("" if dialect.usage else ", without stream_options")
                notes.append(f"{self.name}: {asked} ({refused})")
            if answered.counted:
                notes.append(f"{self.name}: reports no usage: output tokens are chunks with text; input tokens unknown")
            return notes
        raise ServerError(f"{self.name} at {self.base} does not take the requests: {refused}")

    async def _first_model(self) -> str:
        """What the server names first at /v1/models."""
        response = await self._client.get(f"{self.base}/v1/models", timeout=GET_SECONDS)
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        found = _json(response.content)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(
                f"{self.name} at {self.base} names no model at /v1/models: give one with --model"
            ) from None

    async def _probe(self) -> Outcome:
        outcome = Outcome()
        await self._streamed(self.body(PROBE, PROBE_TOKENS), outcome, PROBE_CHUNKS)
        if outcome.output_tokens > PROBE_TOKENS:
            raise _RefusedError(f"{outcome.output_tokens} tokens where {self.dialect.limit} was {PROBE_TOKENS}")
        return outcome

    def body(self, prompt: str, max_tokens: int | None = None) -> bytes:
        """A request as it is sent."""
        ask, dialect = self.ask_for, self.dialect
        content: dict[str, Any] = {"model": self.model, dialect.limit: max_tokens or ask.max_tokens, "stream": True}
        if ask.endpoint == "chat":
            content["messages"] = [{"role": "user", "content": prompt}]
        else:
            content["prompt"] = prompt
        if dialect.usage:
            content["stream_options"] = {"include_usage": True}
        if ask.temperature is not None:
            content["temperature"] = ask.temperature
        if ask.ignore_eos:
            content["ignore_eos"] = True
        return json.dumps(content | dict(ask.extra)).encode()

    async def ask(self, prompt: str) -> Outcome:
        """One request by the clock; whatever goes wrong is the outcome's ``error``."""
        outcome, body = Outcome(), self.body(prompt)
        try:
            await self._streamed(body, outcome)
        except (ServerError, _NotReadyError, _RefusedError, BrokenStreamError, httpx2.HTTPError) as error:
            outcome.error = shortened(f"{str(error) or 'no message'} ({type(error).__name__.lstrip('_')})")
        except TimeoutError:
            outcome.error = f"no end after {self.ask_for.seconds:g} s (timeout)"
        return outcome

    async def _streamed(self, body: bytes, outcome: Outcome, most: int | None = None) -> None:
        events, reading = Events(), Reading(outcome)
        limit = asyncio.timeout(self.ask_for.seconds)
        outcome.started = time.perf_counter()
        try:
            async with limit, self._client.stream("POST", self._url, content=body, headers=_JSON) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for part in response.aiter_raw():
                    now = time.perf_counter()
                    for data in events.feed(part):
                        reading.take(data, now)
                    if most is not None and outcome.text_chunks > most:
                        raise _RefusedError(f"it passes over {self.dialect.limit}")
                    if reading.done:
                        limit.reschedule(asyncio.get_running_loop().time() + GRACE)
                for data in events.close():
                    reading.take(data, time.perf_counter())
        except TimeoutError:
            if not reading.done:
                raise
        reading.end()

    async def metrics(self) -> str:
        """The text at /metrics; empty where there is none."""
        try:
            response = await self._client.get(f"{self.base}/metrics", timeout=GET_SECONDS)
        except httpx2.HTTPError:
            return ""
        return response.text if response.status_code == 200 else ""


_JSON = {"Content-Type": "application/json", "Accept": "text/event-stream"}


class _NotReadyError(Exception):
    """A server that may yet answer."""


class _RefusedError(Exception):
    """A request that the server will not take, however often it is sent."""


def _refusal(status: int, body: bytes) -> Exception:
    found = _json(body)
    told = said(found) if found is not None else shortened(body.decode(errors="replace"))
    kind = _RefusedError if status in _REFUSED else ServerError if 400 <= status < 429 else _NotReadyError
    return kind(f"status {status}: {told}")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _parsed(base: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base)
    except (httpx2.InvalidURL, TypeError) as error:
        raise OptionError(f"--url {base}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise OptionError(
            f"--url {base}: must be http://HOST:PORT or https://…, with NAME= before it where it has a name"
        )
    return url


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
