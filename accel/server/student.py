"""The served model as a cascade's student, and as what finds its demonstrations: jobs of the engine, waited for.

Everything here blocks and runs in a cascade's threads; the model itself is only run by the engine's.
"""

from __future__ import annotations

import logging
import math
import queue
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import accel
from accel.artifacts import config_digest, json_digest, tokenizer_digest
from accel.distill.weights import weights_digest
from accel.engine.jobs import ClosedError, Done, Event, Failed, Piece
from accel.engine.service import Service
from accel.errors import AccelError, first_line
from accel.methods.cascade.answerer import (
    Answerer,
    Message,
    Messages,
    Reply,
    Sample,
    Sampling,
    Unanswered,
    check_question,
)
from accel.methods.cascade.embedding import MAX_TOKENS, UNRELATED
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.prices import Price, Usage
from accel.server.errors import ApiError, without_paths
from accel.server.generation import Choice, observe
from accel.server.preparing import Prepared, Preparer
from accel.server.protocol import AccelFields, ChatRequest

if TYPE_CHECKING:
    from accel.server.metrics import Metrics

log = logging.getLogger("accel.server")

# how often somebody who waits looks whether the engine still lives
LOOK = 1.0
# of what an endpoint says of its failure, the part that is nobody's secret
_WHY = re.compile(r"no answer within [\d.e+-]+ s$| \(HTTP \d{3}\)$")
_FINISH = re.compile(r"[a-z_]{1,32}")


class Call:
    """One request: until when its answer is wanted, and whether anybody still waits for it."""

    def __init__(self, seconds: float | None = None) -> None:
        self._until = math.inf if seconds is None else time.monotonic() + seconds
        self.gone = False
        # (what was asked, what the engine says of it); None: look up, something else has happened
        self.events: queue.SimpleQueue[tuple[object, Event] | None] = queue.SimpleQueue()

    def left(self) -> float:
        return self._until - time.monotonic()

    def abandon(self) -> None:
        """Nobody waits any more; from any thread."""
        self.gone = True
        self.events.put(None)


class ServedStudent:
    """An ``Answerer`` over the engine, for one request. ``extension``: how its jobs are decoded."""

    shares_prompt = True

    def __init__(
        self,
        service: Service,
        preparer: Preparer,
        name: str,
        price: Price | None,
        call: Call,
        extension: AccelFields,
        metrics: Metrics | None = None,
    ) -> None:
        self.name, self.price = name, price
        # why the engine did not take the last job
        self.refusal: Exception | None = None
        self._service, self._preparer, self._call = service, preparer, call
        self._extension, self._metrics = extension, metrics

    def prepared(self, messages: Messages, n: int, settings: Sampling, seconds: float) -> Prepared:
        """The one job that draws n answers."""
        body = {
            "messages": [dict(message) for message in messages],
            "n": n,
            "temperature": float(settings.temperature),
            # a checkpoint's own choices would change what is asked for here
            "top_p": float(settings.top_p or 1.0),
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": settings.max_tokens,
            "stop": list(settings.stop) or None,
            "seed": settings.seed,
            "timeout": min(seconds, 1e6),
        }
        request = ChatRequest.model_validate(body)
        return self._preparer.chat(request.model_copy(update={"accel": self._extension}))

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        """n samples that share their prompt; what is not finished when the time is over is no answer."""
        check_question(messages, n, seconds)
        return _Asked(self, messages, n, settings, min(seconds, self._call.left())).reply()


class _Asked:
    """One job and its samples so far."""

    def __init__(self, student: ServedStudent, messages: Messages, n: int, settings: Sampling, seconds: float) -> None:
        self._student, self._service, self._call = student, student._service, student._call
        self._messages, self._n, self._settings, self._seconds = messages, n, settings, seconds
        self._began, self._counted_from = time.monotonic(), time.perf_counter()
        self._choices: list[Choice] = []
        self._prompt_tokens = 0

    def reply(self) -> Reply:
        if self._seconds <= 0:
            raise self._unanswered("no time left")
        number = self._submitted()
        try:
            done = self._collected(number)
        finally:
            # of an engine that has died nothing runs, and of a job that is over nothing is left
            with suppress(ClosedError):
                self._service.cancel(number)
            for choice in self._choices:
                observe(self._student._metrics, choice, self._prompt_tokens, self._counted_from)
        samples = tuple(Sample(choice.text, choice.finish or "abort") for choice in self._choices)
        if any(sample.finish == "abort" for sample in samples):
            raise self._unanswered(f"no answer within {self._seconds:.3g} s" if self._left() < 0.1 else "aborted")
        usage = Usage(self._prompt_tokens, min(done.cached_tokens, self._prompt_tokens), self._written())
        return Reply(samples, usage, time.monotonic() - self._began, self._student.name)

    def _submitted(self) -> int:
        try:
            prepared = self._student.prepared(self._messages, self._n, self._settings, self._seconds)
            (job,) = prepared.jobs
            self._choices = [Choice(i, prepared.cut.stream(prepared.decode), prepared.cut) for i in range(self._n)]
            self._prompt_tokens = len(job.prompt)
            return self._service.submit(job, lambda event: self._call.events.put((self, event)))
        except (ApiError, AccelError, ValueError) as error:
            self._choices = []
            self._student.refusal = error
            raise self._unanswered(without_paths(first_line(error))) from error

    def _collected(self, number: int) -> Done:
        """Everything that the engine says, until it is done."""
        while True:
            if self._call.gone:
                raise self._unanswered("nobody waits for the answer any more")
            # the engine looks at its clock between steps
            if self._left() <= 0:
                raise self._unanswered(f"no answer within {self._seconds:.3g} s")
            try:
                told = self._call.events.get(timeout=min(self._left(), LOOK))
            except queue.Empty:
                if self._service.failure is not None:
                    raise self._unanswered("the engine has failed") from None
                continue
            # of a job before this one there may be more to come
            if told is None or told[0] is not self:
                continue
            event = told[1]
            if isinstance(event, Failed):
                raise self._unanswered(without_paths(first_line(event.error)))
            if isinstance(event, Done):
                return event
            self._take(event, number)

    def _take(self, piece: Piece, number: int) -> None:
        choice = self._choices[piece.index]
        if choice.finish is not None:
            return
        choice.take(piece)
        if choice.stream.stopped is not None and all(each.finish for each in self._choices):
            self._service.cancel(number)

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def _written(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    def _unanswered(self, why: str) -> Unanswered:
        # a prompt that gave no token may not have been read
        usage = Usage(self._prompt_tokens, 0, written) if (written := self._written()) else Usage()
        return Unanswered(f"{self._student.name}: {why}", seconds=time.monotonic() - self._began, usage=usage)


class WatchedTeacher:
    """A teacher as one request asks it: not for nobody, not beyond the request's time, and in words for strangers.

    What an endpoint says of its failures names its address, and may name the account behind it: the log has that.
    """

    def __init__(self, teacher: Answerer, call: Call) -> None:
        self.name, self.price = teacher.name, teacher.price
        self._teacher, self._call = teacher, call

    @property
    def shares_prompt(self) -> bool:
        return self._teacher.shares_prompt

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        left = min(seconds, self._call.left())
        if self._call.gone or left <= 0:
            why = "nobody waits for the answer any more" if self._call.gone else "no time left"
            raise Unanswered(f"{self.name}: not asked, {why}", seconds=0.0, usage=Usage())
        try:
            reply = self._teacher.sample(messages, n, settings, seconds=left)
        except Unanswered as error:
            log.warning("the teacher did not answer: %s", self._without_key(str(error)))
            public = _WHY.search(str(error))
            said = "" if public is None else public[0].removeprefix("no answer")
            raise Unanswered(f"{self.name}: no answer{said}", seconds=error.seconds, usage=error.usage) from error
        samples = tuple(
            each if _FINISH.fullmatch(each.finish) else replace(each, finish="stop") for each in reply.samples
        )
        return replace(reply, samples=samples, model=reply.model.encode("ascii", "replace").decode()[:256])

    def _without_key(self, text: str) -> str:
        key = self._teacher.api_key if isinstance(self._teacher, Endpoint) else None
        return text.replace(key, "…") if key else text


class ServedEmbedder:
    """The served model's last hidden state of a text's last token, without what all texts have in common, normalised.

    Not the vectors of ``HiddenStateEmbedder``, which are means over tokens: a store knows them apart by the digest.
    """

    def __init__(self, service: Service, model: accel.Model) -> None:
        tokenizer: Any = model.tokenizer
        self._service, self._tokenizer = service, tokenizer
        self._max_tokens = min(MAX_TOKENS, (service.max_positions or MAX_TOKENS + 1) - 1)
        self.size = int(model.model.config.get_text_config().hidden_size)
        self.name = "last hidden states of the served model"
        self._common = self._states(UNRELATED).mean(0)
        said = [config_digest(model.model.config), tokenizer_digest(tokenizer), weights_digest(model.model)]
        self.digest = json_digest([*said, self._max_tokens, UNRELATED, "last token"])

    def embed(self, texts: Sequence[str]) -> Tensor:
        return normalize(self._states(texts) - self._common, dim=-1)

    def _states(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.size)
        found: queue.SimpleQueue[list[list[float]] | Exception] = queue.SimpleQueue()
        self._service.embed([self._tokens(text) for text in texts], found.put)
        while True:
            try:
                vectors = found.get(timeout=LOOK)
            except queue.Empty:
                if self._service.failure is not None:
                    raise ClosedError("the engine has failed") from None
                continue
            if isinstance(vectors, Exception):
                raise vectors
            return torch.tensor(vectors)

    def _tokens(self, text: str) -> list[int]:
        # cut here: a tokenizer that cuts would cut for the other threads too
        ids = list(self._tokenizer(text)["input_ids"])[: self._max_tokens]
        return ids or [
            next(id for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, 0) if id is not None)
        ]


def plain_messages(messages: Sequence[Any]) -> list[Message]:
    """A request's messages as cascades know them: a role and a text; what is more than that is refused."""
    found: list[Message] = []
    for number, message in enumerate(messages):
        if message.role == "tool" or getattr(message, "tool_calls", None):
            raise ApiError(f"messages[{number}] is of a tool call: a cascade asks without tools", param="messages")
        content = message.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        found.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return found
