"""Answers to requests for text, as OpenAI writes them: whole or in chunks. Completions and chats differ in little."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from accel.server.choices import Vocabulary, chat_logprobs, completion_logprobs
from accel.server.generation import Choice, Generation, Update
from accel.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from accel.server.protocol import Generation as GenerationRequest


class Answer:
    """One request's answer. Subclasses say what a choice looks like."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, request: GenerationRequest, generation: Generation, vocabulary: Vocabulary, model: str) -> None:
        self.generation = generation
        self.vocabulary = vocabulary
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._options = request.stream_options or StreamOptions()
        self._wants_stats = request.accel is not None and request.accel.stats

    def whole(self) -> dict[str, Any]:
        """All of it, when the generation is over."""
        choices = [self._choice(choice) for choice in self.generation.choices]
        body = {"object": self.whole_object, **self._head, "choices": choices, "usage": self._usage()}
        return body | self._extension()

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """What there is to tell of an update."""
        return [self._chunk([choice]) for choice in self._deltas(update)]

    def last(self) -> list[dict[str, Any]]:
        """What is known when all choices have finished, where it was asked for."""
        usage = {"usage": self._usage()} if self._options.include_usage else {}
        rest = usage | self._extension()
        return [self._chunk([]) | rest] if rest else []

    def headers(self) -> dict[str, str]:
        """The request's figures in short."""
        stats = self.generation.stats
        if not stats:
            return {}
        drafted = sum(each.drafted_tokens for each in stats)
        accepted = sum(each.accepted_tokens for each in stats)
        calls = sum(each.row_calls for each in stats)
        shown = {
            "x-accel-method": stats[0].method,
            "x-accel-tau": f"{1 + accepted / calls if calls else 1:.3f}",
            "x-accel-cached-tokens": str(self.generation.cached_tokens),
        }
        return shown | ({"x-accel-acceptance-rate": f"{accepted / drafted:.3f}"} if drafted else {})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        chunk = {"object": self.chunk_object, **self._head, "choices": choices}
        if self._options.continuous_usage_stats and self._options.include_usage:
            chunk["usage"] = self._usage()
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.generation.prompt_tokens, self.generation.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }

    def _extension(self) -> dict[str, Any]:
        if not self._wants_stats:
            return {}
        figures = [_plain(each.as_dict()) for each in self.generation.stats]
        # a list where there were several prompts
        return {"accel": figures[0] if len(figures) == 1 else figures}


class CompletionAnswer(Answer):
    """Of /v1/completions. ``texts``: the prompts as text, for requests that want them back."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        vocabulary: Vocabulary,
        model: str,
        texts: Sequence[str],
    ) -> None:
        super().__init__(request, generation, vocabulary, model)
        self._texts = texts
        self._n = request.n or 1
        self._has_logprobs = request.logprobs is not None
        # choice → where its next token stands in the text; absent before its first chunk
        self._offsets: dict[int, int] = {}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return self._shown(choice, self._begun(choice) + choice.text, choice.logprobs, begin=True)

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        choice = update.choice
        begin = choice.index not in self._offsets
        text = (self._begun(choice) if begin else "") + update.text
        shown = self._shown(choice, text, update.logprobs, begin=begin)
        return [shown] if text or update.logprobs or choice.finish else []

    def _begun(self, choice: Choice) -> str:
        return self._texts[choice.index // self._n] if self._texts else ""

    def _shown(self, choice: Choice, text: str, logprobs: Sequence[Any], *, begin: bool) -> dict[str, Any]:
        found = self._logprobs(choice, logprobs, begin) if self._has_logprobs else None
        self._offsets.setdefault(choice.index, 0)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": found,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, choice: Choice, logprobs: Sequence[Any], begin: bool) -> dict[str, Any]:
        tokens, values = [each.token for each in logprobs], list(logprobs)
        if begin and self._texts:
            job = choice.index // self._n
            tokens = [*self.generation.jobs[job].prompt, *tokens]
            values = [*self.generation.prompt_logprobs[job], *values]
        found = completion_logprobs(self.vocabulary, tokens, values, self._offsets.get(choice.index, 0))
        if tokens:
            self._offsets[choice.index] = found["text_offset"][-1] + len(found["tokens"][-1])
        return found


class ChatAnswer(Answer):
    """Of /v1/chat/completions. ``parsers``: one a choice where tools may be called; ``begun``: text to repeat."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request: ChatRequest,
        generation: Generation,
        vocabulary: Vocabulary,
        model: str,
        parsers: Sequence[Any],
        begun: str = "",
    ) -> None:
        super().__init__(request, generation, vocabulary, model)
        self._parsers = parsers
        self._begun = begun
        self._has_logprobs = bool(request.logprobs)
        self._one_call = request.parallel_tool_calls is False
        # choices whose first chunk was sent, and those that call tools
        self._seen: set[int] = set()
        self._calling: set[int] = set()

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content, calls = self._begun, dict[int, dict[str, Any]]()
        for delta in self._parsed(choice, choice.text, last=True):
            content += delta.get("content", "")
            for part in delta.get("tool_calls", ()):
                _join(calls, part)
        message: dict[str, Any] = {"role": "assistant", "content": content or ("" if not calls else None)}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = list(calls.values())
        return self._framed(choice, {"message": message}, choice.logprobs)

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        choice = update.choice
        deltas = self._parsed(choice, update.text, last=choice.finish is not None)
        found = []
        if choice.index not in self._seen:
            self._seen.add(choice.index)
            found.append(self._framed(choice, {"delta": {"role": "assistant", "content": self._begun}}, [], end=False))
        if not deltas and (update.logprobs or choice.finish):
            deltas = [{"content": ""}] if update.logprobs else [{}]
        for number, delta in enumerate(deltas, start=1):
            # what comes once comes with the last
            last = number == len(deltas)
            logprobs = update.logprobs if last else []
            found.append(self._framed(choice, {"delta": delta}, logprobs, end=last))
        return found

    def _framed(
        self, choice: Choice, what: dict[str, Any], logprobs: Sequence[Any], *, end: bool = True
    ) -> dict[str, Any]:
        finish = choice.finish if end else None
        if finish == "stop" and choice.index in self._calling:
            finish = "tool_calls"
        shown = (
            chat_logprobs(self.vocabulary, logprobs) if self._has_logprobs and (logprobs or "message" in what) else None
        )
        framed = {"index": choice.index, **what, "logprobs": shown, "finish_reason": finish}
        return framed | ({"stop_reason": choice.stop_reason} if end and choice.finish is not None else {})

    def _parsed(self, choice: Choice, text: str, *, last: bool) -> list[dict[str, Any]]:
        if not self._parsers:
            return [{"content": text}] if text else []
        parser = self._parsers[choice.index]
        found = parser.feed(text) if text else []
        if last:
            found = [*found, *parser.finish()]
        return [shown for delta in found if (shown := self._delta(choice, delta))]

    def _delta(self, choice: Choice, delta: Any) -> dict[str, Any]:
        if delta.content is not None:
            return {"content": delta.content} if delta.content else {}
        if self._one_call and delta.index:
            return {}
        self._calling.add(choice.index)
        function = {} if delta.name is None else {"name": delta.name}
        function["arguments"] = delta.arguments or ""
        head = {} if delta.id is None else {"id": delta.id, "type": "function"}
        return {"tool_calls": [{"index": delta.index, **head, "function": function}]}


def _join(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a piece of a call to what came before it."""
    call = calls.setdefault(part["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call["id"] = part.get("id", call["id"])
    function = part["function"]
    call["function"]["name"] += function.get("name", "")
    call["function"]["arguments"] += function["arguments"]


def _plain(value: Any) -> Any:
    """Figures that JSON can carry."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
