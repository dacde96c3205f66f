"""A model behind an OpenAI-compatible endpoint: chat completions with time limits, retries and one-line errors.

Every call ends within its limit, whatever the server does: refuses, is silent, drips, or says something else.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from accel.errors import ModelError, OptionError, first_line
from accel.methods.cascade import background
from accel.methods.cascade.answerer import Messages, Reply, Sample, Sampling, Unanswered, check_question
from accel.methods.cascade.prices import Price, Usage

# worth another try: too many requests, or a server that may recover
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# how servers say that they know no n above 1
REFUSES_N = frozenset({400, 422, 501})
_KEY = re.compile(r"[!-~]+")
# half a character, which JSON can bring and no conversation may hold
_HALVES = re.compile("[\ud800-\udfff]")
MAX_ANSWER_BYTES = 32 * 2**20
# seconds between the first two tries; doubled each time, and scattered, so that many clients do not come at once
BACKOFF, LONGEST_BACKOFF = 0.5, 30.0


@dataclass(eq=False)
class Endpoint:
    """An ``Answerer``. ``base_url`` ends in what stands before ``/chat/completions``, mostly ``/v1``.

    ``api_key``: the key itself, or in ``key_variable`` the environment variable that holds it. ``retries``: further
    tries after too many requests (429), a server's error or a broken connection. ``one_by_one``: ask for each sample
    with a request of its own; found out by itself where a server refuses or ignores ``n``. ``limit_field``: what the
    server calls the token limit. ``extra``: more fields of the request's body.
    """

    base_url: str
    model: str
    price: Price | None = None
    api_key: str | None = field(default=None, repr=False)
    key_variable: str | None = None
    name: str = ""
    retries: int = 3
    one_by_one: bool = False
    limit_field: str = "max_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = httpx2.URL(self.base_url) if _is_url(self.base_url) else None
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise OptionError(f"base_url={self.base_url!r}: must be http(s)://HOST[:PORT]/v1 or the like")
        if not self.model:
            raise OptionError("model='': name the model that the endpoint is to run")
        if type(self.retries) is not int or self.retries < 0:
            raise OptionError(f"retries={self.retries!r}: must be a whole number ≥ 0")
        if self.key_variable is not None and self.api_key is None:
            self.api_key = os.environ.get(self.key_variable)
            if not self.api_key:
                raise OptionError(f"the environment variable {self.key_variable} holds no key for {self.base_url}")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise OptionError(f"the key for {self.base_url} must be printable, without spaces or line ends")
        try:
            json.dumps(dict(self.extra), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise OptionError(f"extra={str(self.extra)[:60]}: fields of a JSON body: {first_line(error)}") from error
        self.name = self.name or self.model
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._client: httpx2.AsyncClient | None = None
        self._client_loop: asyncio.AbstractEventLoop | None = None

    @property
    def shares_prompt(self) -> bool:
        return not self.one_by_one

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        """n samples, in one request where the server can; raises ``Unanswered``."""
        check_question(messages, n, seconds)
        began = time.monotonic()
        call = _Call(began + seconds)
        try:
            answers = background.run(lambda: self._samples(messages, n, settings, call), seconds)
        except TimeoutError as error:
            raise self._unanswered(f"no answer within {seconds:g} s", began, call) from error
        except Exception as error:  # whatever a network, a proxy's settings and the libraries below raise
            raise self._unanswered(_reason(error), began, call) from error
        return Reply(
            tuple(sample for each in answers for sample in each.samples)[:n],
            _together(call.told),
            time.monotonic() - began,
            answers[0].model or self.model,
        )

    def close(self) -> None:
        """Close connections; asked again, it opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_loop is background.current():
            background.run(client.aclose, 5.0)

    async def _samples(self, messages: Messages, n: int, settings: Sampling, call: _Call) -> Sequence[_Answer]:
        """One answer or more, with n samples in all."""
        if n == 1 or self.one_by_one:
            return await self._singles(messages, range(n), settings, call)
        try:
            answer = await self._ask(self._body(messages, n, settings), call)
        except _Refused as error:
            if error.status not in REFUSES_N:
                raise
            answers = await self._singles(messages, range(n), settings, call)
            # the same question in parts was answered: it was n that the server did not like
            self.one_by_one = True
            return answers
        if len(answer.samples) >= n:
            return [answer]
        self.one_by_one = True
        return [answer, *await self._singles(messages, range(len(answer.samples), n), settings, call)]

    async def _singles(self, messages: Messages, numbers: range, settings: Sampling, call: _Call) -> list[_Answer]:
        """A request for each sample, at the same time. One that fails fails all, when it is known what they took."""
        bodies = [self._body(messages, 1, settings, number) for number in numbers]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._caught(body, call)) for body in bodies]
        answers = [task.result() for task in tasks]
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if failed is not None:
            raise failed
        return [answer for answer in answers if isinstance(answer, _Answer)]

    async def _caught(self, body: dict[str, Any], call: _Call) -> _Answer | Exception:
        """An error as a value: a group of tasks would wrap it."""
        try:
            return await self._ask(body, call)
        except Exception as error:
            return error

    def _body(self, messages: Messages, n: int, settings: Sampling, number: int = 0) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": settings.temperature,
            self.limit_field: settings.max_tokens,
            "stream": False,
        }
        if n > 1:
            body["n"] = n
        if settings.top_p is not None:
            body["top_p"] = settings.top_p
        if settings.stop:
            body["stop"] = list(settings.stop)
        if settings.seed is not None:
            # samples of one seed would be one sample
            body["seed"] = settings.seed + number
        return body | dict(self.extra)

    async def _ask(self, body: dict[str, Any], call: _Call) -> _Answer:
        """One request, tried again where that may help."""
        for attempt in range(self.retries + 1):
            try:
                return await self._once(body, call)
            except (_Refused, httpx2.TransportError) as error:
                wait = _wait(error, attempt)
                if attempt == self.retries or wait is None or time.monotonic() + wait > call.last:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("the last try returns or raises")

    async def _once(self, body: dict[str, Any], call: _Call) -> _Answer:
        client = self._connected()
        async with client.stream("POST", self._url, json=body) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise _Refused(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MB", response.status_code)
                parts.append(part)
        data = b"".join(parts)
        try:
            if response.status_code != 200:
                raise _Refused(_said(data), response.status_code, response.headers.get("retry-after"))
            answer = _parse(data)
        except _Refused:
            # a failure is charged where the server says so
            if (usage := _reported(data)) is not None:
                call.told.append(usage)
            raise
        call.told.append(answer.usage)
        if not answer.samples:
            raise _Refused("an answer without choices", response.status_code)
        return answer

    def _connected(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._client_loop is not loop:
            headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
            # the limit of the whole call is kept outside; redirects would carry the key to another place
            self._client = httpx2.AsyncClient(headers=headers, timeout=None, follow_redirects=False)
            self._client_loop = loop
        return self._client

    def _unanswered(self, why: str, began: float, call: _Call) -> Unanswered:
        message = f"{self.name} at {self.base_url}: {why}"
        return Unanswered(message, seconds=time.monotonic() - began, usage=_together(call.told))


@dataclass(frozen=True)
class _Call:
    """When the whole call must be over, and what was charged for: answers, and failures that reported tokens."""

    last: float
    told: list[Usage | None] = field(default_factory=list)


class _Refused(Exception):
    """An answer that is none. ``status``: the server's code."""

    def __init__(self, message: str, status: int, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class _Answer:
    samples: tuple[Sample, ...]
    usage: Usage | None
    model: str


def _parse(data: bytes) -> _Answer:
    """A chat completion, as far as it can be believed."""
    try:
        raw = json.loads(data)
        choices = raw["choices"]
        samples = tuple(Sample(_text(each["message"]), str(each.get("finish_reason") or "stop")) for each in choices)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Refused(f"no chat completion: {_said(data)}", 200) from error
    model = raw.get("model")
    return _Answer(samples, _usage(raw.get("usage")), model if isinstance(model, str) else "")


def _text(message: Mapping[str, Any]) -> str:
    """The content; empty where there is none (a refusal, a call of a tool), which agrees with nothing."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    return _HALVES.sub("\ufffd", content) if isinstance(content, str) else ""


def _reported(data: bytes) -> Usage | None:
    """The tokens that a body reports, whatever else it holds."""
    try:
        return _usage(json.loads(data)["usage"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _usage(raw: Any) -> Usage | None:
    """Tokens; None where the server does not count, or not sensibly."""
    try:
        details = raw.get("prompt_tokens_details") or {}
        return Usage(raw["prompt_tokens"], details.get("cached_tokens") or 0, raw["completion_tokens"])
    except (AttributeError, KeyError, TypeError, OptionError):
        return None


def _together(usages: Sequence[Usage | None]) -> Usage | None:
    """The sum; None where a part is unknown."""
    return None if None in usages else sum((each for each in usages if each is not None), Usage())


def _said(data: bytes) -> str:
    """What a body says, in one line: an error object's message, or its beginning."""
    text = data[:4096].decode("utf-8", "replace")
    try:
        raw = json.loads(data)
        error = raw.get("error", raw.get("detail", raw))
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return first_line(ModelError(text)) if text.strip() else "nothing"


def _reason(error: BaseException) -> str:
    if isinstance(error, _Refused):
        return f"{error} (HTTP {error.status})"
    # some errors of the network have no words
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to the next try; None where one would not help."""
    wait = min(BACKOFF * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
    if isinstance(error, httpx2.TransportError):
        # a scheme or a proxy that cannot work will not work later either
        return None if isinstance(error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)) else wait
    if not isinstance(error, _Refused) or error.status not in RETRIED:
        return None
    return max(wait, _seconds(error.retry_after))


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, seconds or a date; 0 where there is none that can be read."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _is_url(text: str) -> bool:
    try:
        httpx2.URL(text)
    except (httpx2.InvalidURL, TypeError):
        return False
    return True
