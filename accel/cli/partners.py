"""Who answers in ``accel chat``: a model that is loaded here, or one behind an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accel.errors import ModelError, OptionError, first_line

Messages = Sequence[dict[str, str]]

# a server that says nothing for so long has lost the request; a first token may take long
SILENCE_SECONDS = 300.0
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Figures:
    """Of one answer; None and 0 where nobody said."""

    tokens: int | None = None
    # tokens a row gained from one pass of the model
    accepted_length: float | None = None
    drafted: int = 0
    accepted: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, stats: Mapping[str, Any], tokens: int | None = None) -> Figures:
        """From ``accel.Stats.as_dict()``, which a server sends too."""
        drafted = int(stats.get("drafted_tokens") or 0)
        return cls(
            tokens if tokens is not None else stats.get("generated_tokens"),
            stats.get("mean_accepted_length") if drafted else None,
            drafted,
            int(stats.get("accepted_tokens") or 0),
            tuple(stats.get("notes") or ()),
        )


class Partner(Protocol):
    """Answers a conversation in pieces."""

    name: str

    def stream(self, messages: Messages) -> Generator[str]: ...

    def figures(self) -> Figures:
        """Of the last whole answer."""
        ...

    def close(self) -> None: ...


class Local:
    """A model in this process."""

    def __init__(
        self,
        model: str,
        artifacts: Sequence[str],
        options: Mapping[str, Any],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> None:
        # it takes seconds to import, and a server's model needs none of it
        import accel

        told = dict(options) if seed is None else {**options, "seed": seed}
        self.name = model
        self._model = accel.load(model, artifacts, **told)
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._settings |= {"temperature": temperature, "top_k": 0}

    def stream(self, messages: Messages) -> Generator[str]:
        pieces = self._model.stream(list(messages), **self._settings)
        try:
            yield from pieces
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def figures(self) -> Figures:
        return Figures.of(self._model.stats.as_dict())

    def close(self) -> None:
        pass


class Remote:
    """A model behind ``/v1/chat/completions``."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str | None,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> None:
        import httpx2

        self._client = httpx2.Client(
            base_url=_base(url),
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
        )
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL)
        self._figures = Figures()
        self._body: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "stream": True}
        if seed is not None:
            self._body["seed"] = seed
        found, self._ours = self._first_model()
        if found is None and model is None:
            raise ModelError(f"{self._client.base_url}models lists no model: name one, or another --url")
        self.name = model or str(found)

    def stream(self, messages: Messages) -> Generator[str]:
        body = {"model": self.name, "messages": list(messages), **self._body}
        body["stream_options"] = {"include_usage": True}
        if self._ours:
            # another server might refuse what it does not know
            body["accel"] = {"stats": True}
        usage: Mapping[str, Any] = {}
        stats: Mapping[str, Any] = {}
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ModelError(f"{self._client.base_url}: {_reason(response.status_code, response.content)}")
                for line in response.iter_lines():
                    chunk = self._chunk(line)
                    usage, stats = chunk.get("usage") or usage, chunk.get("accel") or stats
                    for choice in chunk.get("choices") or ():
                        if text := (choice.get("delta") or {}).get("content"):
                            yield text
        except self._failures as error:
            raise ModelError(f"{self._client.base_url}: {first_line(error)}") from error
        self._figures = Figures.of(stats, usage.get("completion_tokens"))

    def figures(self) -> Figures:
        return self._figures

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> tuple[str | None, bool]:
        """The name of the first model that the server lists, and whether the server is accel's."""
        try:
            response = self._client.get("models")
        except self._failures as error:
            raise ModelError(f"{self._client.base_url}: {first_line(error)}") from error
        if response.status_code in (401, 403):
            raise ModelError(f"{self._client.base_url}: {_reason(response.status_code, response.content)}")
        try:
            first = response.json()["data"][0]
            return str(first["id"]), first.get("owned_by") == "accel"
        except (ValueError, LookupError, TypeError, AttributeError):
            return None, False

    def _chunk(self, line: str) -> dict[str, Any]:
        """What a line of the stream says; nothing where it is empty, a comment or the end."""
        field, _, data = line.partition(":")
        if field != "data" or data.strip() == "[DONE]":
            return {}
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise ModelError(f"{self._client.base_url}: sent what is not JSON: {data[:80]!r}")
        if "error" in chunk:
            raise ModelError(f"{self._client.base_url}: {_message(chunk) or 'failed in the middle of an answer'}")
        return chunk


def _base(url: str) -> str:
    """``http://host:8000`` means its /v1."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = None
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        raise OptionError(f"--url {url}: must be http(s)://HOST[:PORT]/v1 or the like")
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=(path or "/v1") + "/"))


def _reason(status: int, content: bytes) -> str:
    try:
        said = _message(json.loads(content))
    except ValueError:
        said = None
    return f"{status}: {said}" if said else f"answered {status}"


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:240] if text else None
