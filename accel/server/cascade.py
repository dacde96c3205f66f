"""A cascade behind the server: which requests are its own, threads for what blocks, and its answers as OpenAI's.

Each request has a cascade of its own over the server's: its options, its time, and a student that can be given up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import accel
from accel.artifacts import Artifact
from accel.engine.given import opened, parted
from accel.engine.jobs import ClosedError, QueueFullError
from accel.engine.service import Service
from accel.errors import OptionError
from accel.methods.cascade import build
from accel.methods.cascade.accounting import STUDENT, TEACHER, Ledger
from accel.methods.cascade.answerer import Messages
from accel.methods.cascade.build import CascadeSetup
from accel.methods.cascade.demos import Demos
from accel.methods.cascade.embedding import Embedder, packaged_folder
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prices import PriceTable, Usage
from accel.methods.cascade.router import ESCALATED, Answer, Cascade, NoAnswer
from accel.server.errors import ApiError, api_error, without_paths
from accel.server.preparing import Preparer
from accel.server.protocol import AccelFields, ChatRequest, Generation, StreamOptions
from accel.server.settings import ServerSettings
from accel.server.student import Call, ServedEmbedder, ServedStudent, WatchedTeacher, plain_messages
from accel.types import options_from

if TYPE_CHECKING:
    from accel.server.metrics import Metrics

METHOD = "cascade"
# requests that wait for a cascade's answer at a time, each in a thread
MAX_THREADS = 32
NONE_HERE = "this server has no cascade: start it with --teacher, demonstrations (-a) or --cascade-option"
# fields that a cascade cannot follow, with the values that ask for nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (False,),
}


@dataclass(frozen=True)
class CascadePlan:
    """What whoever starts a server says of its cascade, checked before a model is loaded for it."""

    setup: CascadeSetup
    demos: tuple[Demos, ...] = ()

    @classmethod
    def read(
        cls, teacher: str | None, options: Mapping[str, Any], artifacts: Sequence[object]
    ) -> tuple[CascadePlan | None, list[object]]:
        """The plan, None where nothing asks for a cascade, and the artifacts that are for the model."""
        found, others = parted(map(opened, artifacts), Demos)
        if teacher is None and not options and not found:
            return None, others
        if "teacher" in options:
            raise OptionError("--cascade-option teacher=…: name it with --teacher MODEL@URL")
        if teacher is not None and "@http" not in teacher:
            raise OptionError(
                f"--teacher {teacher}: must be MODEL@URL of an OpenAI-compatible endpoint, as in "
                "gpt-4.1@https://example.org/v1"
            )
        setup: CascadeSetup = options_from(CascadeSetup, {**options, "teacher": teacher}, "method 'cascade'")
        demos = tuple(Demos.load(each) if isinstance(each, Artifact) else each for each in found)
        return cls(setup, demos), others

    def desk(self, service: Service, model: accel.Model, settings: ServerSettings) -> CascadeDesk:
        """The cascade over a model that is served."""
        setup = self.setup
        prices = PriceTable() if setup.prices is None else PriceTable.read(setup.prices)
        names = (settings.model_name, settings.model_root or settings.model_name)
        price = next((found for name in names if (found := build.priced(name, prices)) is not None), None)
        preparer = Preparer(model, settings)
        student = ServedStudent(service, preparer, settings.model_name, price, Call(), AccelFields())
        try:
            student.prepared([{"role": "user", "content": "?"}], 1, setup.student_sampling(0), 1.0)
        except (ApiError, ValueError) as error:
            raise OptionError(f"this model cannot be a cascade's student: {error}") from error
        teacher = None if setup.teacher is None else build.endpoint(setup.teacher, setup.key_variable, prices)
        embedder: Embedder | None = None
        if (self.demos or setup.store is not None) and setup.embedder is None and packaged_folder() is None:
            # never the model itself from another thread: it is the engine's
            embedder = ServedEmbedder(service, model)
        cascade = build.cascade(student, teacher, setup, self.demos, embedder=embedder)
        return CascadeDesk(cascade, service, preparer, settings)


class CascadeDesk:
    """Answers requests by a cascade, at most ``threads`` of them at a time."""

    def __init__(
        self,
        cascade: Cascade,
        service: Service,
        preparer: Preparer,
        settings: ServerSettings,
        *,
        threads: int = MAX_THREADS,
    ) -> None:
        self.cascade = cascade
        self.name = cascade_name(settings)
        self._service, self._preparer, self._settings = service, preparer, settings
        self._free = threading.BoundedSemaphore(threads)

    def start(self, asked: ChatRequest, metrics: Metrics | None = None) -> CascadeRun:
        """Put the request on its way; raises what is wrong with it."""
        _check_fields(asked)
        given = asked.accel or AccelFields()
        # of the request's own method, options and cartridges it is the student that takes notice
        extension = given.model_copy(update={"method": None if given.method == METHOD else given.method})
        self._preparer.check(asked.model_copy(update={"accel": extension}))
        messages, options = plain_messages(asked.messages), self._options(asked)
        limits = [each for each in (asked.timeout, self._settings.request_timeout) if each is not None]
        call = Call(min(limits, default=None))
        shared = self.cascade
        student = ServedStudent(
            self._service, self._preparer, shared.student.name, shared.student.price, call, extension, metrics
        )
        teacher = None if shared.teacher is None else WatchedTeacher(shared.teacher, call)
        if not self._free.acquire(blocking=False):
            raise QueueFullError("as many requests as may wait for a cascade do so: try again", retry_after=1)
        work = _Work(shared.varied(student, teacher, options), student, teacher, messages, call, metrics)
        return CascadeRun(work, self._free)

    def _options(self, asked: ChatRequest) -> CascadeOptions:
        """The server's, with what the request says in their place."""
        server = self.cascade.options
        chat = {
            "temperature": asked.temperature,
            "max_tokens": asked.max_completion_tokens or asked.max_tokens,
            "stop": asked.stops or None,
            "seed": asked.seed,
        }
        fields = asked.accel.cascade if asked.accel is not None else None
        own = {} if fields is None else fields.model_dump()
        told = {name: value for name, value in (chat | _given(own)).items() if value is not None}
        if "stop" in told:
            told["stop"] = tuple(told["stop"])
        for name in ("student_seconds", "teacher_seconds"):
            if told.get(name, 0) > getattr(server, name):
                given = f"{name}={told[name]:g}"
                raise ApiError(f"{given}: at most {getattr(server, name):g} here", param=f"accel.cascade.{name}")
        most = min(self._settings.max_n, self._service.max_rows + self._service.max_queue)
        if told.get("samples", 0) > most:
            raise ApiError(f"samples={told['samples']}: at most {most} here", param="accel.cascade.samples")
        return dataclasses.replace(server, **told)


@dataclass
class _Work:
    """What a thread does for a request."""

    cascade: Cascade
    student: ServedStudent
    teacher: WatchedTeacher | None
    messages: Messages
    call: Call
    metrics: Metrics | None

    def answer(self) -> Answer:
        options = self.cascade.options
        # a question that cannot be asked is its own fault, and nothing that a teacher should be paid for
        self.student.prepared(self.messages, 1, options.student_sampling(0), options.student_seconds)
        try:
            answer = self.cascade.answer(self.messages)
        except NoAnswer as error:
            self._observe("failed", error.ledger)
            raise self._refused(error) from error
        self._observe(answer.decision, answer.ledger)
        return answer

    def _refused(self, error: NoAnswer) -> ApiError:
        if isinstance(self.student.refusal, QueueFullError | ClosedError):
            return api_error(self.student.refusal)
        return ApiError(without_paths(str(error)), status=502)

    def _observe(self, decision: str, ledger: Ledger) -> None:
        if self.metrics is not None:
            decision = "abandoned" if self.call.gone else decision
            self.metrics.observe_cascade(decision=decision, cost=ledger.cost, saved=ledger.saved)


class CascadeRun:
    """A request on its way, in a thread. What a teacher was asked is answered and paid for though nobody waits."""

    def __init__(self, work: _Work, free: threading.BoundedSemaphore) -> None:
        self._work, self._free = work, free
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[Answer] = self._loop.create_future()
        # one that waits for a teacher must not keep the process from ending
        threading.Thread(target=self._run, name="accel-cascade-request", daemon=True).start()

    async def updates(self) -> AsyncIterator[Answer]:
        """The answer, when it is decided."""
        # shielded: a thread will want to settle it
        yield await asyncio.shield(self._result)

    async def run(self) -> Answer:
        return await asyncio.shield(self._result)

    def close(self) -> None:
        """Nobody waits any more: what it has in the engine is cancelled."""
        if not self._result.done():
            self._result.cancel()
            self._work.call.abandon()

    def _run(self) -> None:
        found: Answer | BaseException
        try:
            found = self._work.answer()
        except BaseException as error:
            found = error
        self._free.release()
        try:
            self._loop.call_soon_threadsafe(self._settle, found)
        except RuntimeError:
            # the loop is closed, and with it everybody who could want to know
            pass

    def _settle(self, found: Answer | BaseException) -> None:
        if self._result.done():
            return
        if isinstance(found, BaseException):
            self._result.set_exception(found)
        else:
            self._result.set_result(found)


class CascadeAnswer:
    """An answer as a chat completion, whole or in chunks; its ``model`` is the one that answered."""

    def __init__(self, asked: ChatRequest) -> None:
        self._answer: Answer | None = None
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self._options = asked.stream_options or StreamOptions()
        self._wants_stats = asked.accel is not None and asked.accel.stats

    def whole(self, answer: Answer) -> dict[str, Any]:
        self._answer = answer
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
        return self._framed("chat.completion", [choice], {"usage": usage_of(answer)} | self._account())

    def chunks(self, answer: Answer) -> list[dict[str, Any]]:
        self._answer = answer
        usage: dict[str, Any] = {}
        if self._options.include_usage:
            usage = {"usage": usage_of(answer) if self._options.continuous_usage_stats else None}
        deltas = [({"role": "assistant", "content": ""}, None), ({"content": answer.text}, None), ({}, answer.finish)]
        return [
            self._framed("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish}], usage)
            for delta, finish in deltas
        ]

    def last(self) -> list[dict[str, Any]]:
        usage = {"usage": usage_of(self._known())} if self._options.include_usage else {}
        rest = usage | self._account()
        return [self._framed("chat.completion.chunk", [], rest)] if rest else []

    def headers(self) -> dict[str, str]:
        """The account in short; what is not known is left out."""
        if self._answer is None:
            return {}
        answer, ledger = self._answer, self._answer.ledger
        figures = {"agreement": answer.verdict.agreement, "cost": ledger.cost, "saved": ledger.saved}
        known = {name: f"{value:.9g}" for name, value in figures.items() if value is not None}
        named = {"decision": answer.decision, "model": _for_header(answer.model or "")}
        return {f"x-accel-cascade-{name}": value for name, value in (named | known).items()}

    def _known(self) -> Answer:
        assert self._answer is not None, "nothing is last before it was shown"
        return self._answer

    def _account(self) -> dict[str, Any]:
        if not self._wants_stats:
            return {}
        found = self._known().as_dict()
        return {"accel": {METHOD: found | {"notes": [without_paths(note) for note in found["notes"]]}}}

    def _framed(self, kind: str, choices: list[dict[str, Any]], rest: Mapping[str, Any]) -> dict[str, Any]:
        return {"object": kind, **self._head, "model": self._known().model, "choices": choices, **rest}


def cascade_name(settings: ServerSettings) -> str:
    """What requests call the cascade, where they name it as a model."""
    return f"{settings.model_name}+cascade"


def wants_cascade(asked: Generation, name: str) -> bool:
    """Whether a request is to be answered by the cascade called ``name``."""
    given = asked.accel
    return asked.model == name or (given is not None and (given.cascade is not None or given.method == METHOD))


def usage_of(answer: Answer) -> dict[str, Any] | None:
    """What the model that answered reports; None where it does not. What others took is in the account."""
    role = TEACHER if answer.decision == ESCALATED else STUDENT
    told = [each.usage for each in answer.ledger.attempts if each.role == role and each.error is None]
    if None in told:
        return None
    usage = sum((each for each in told if each is not None), Usage())
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _check_fields(asked: ChatRequest) -> None:
    """Refuse what a cascade would not do."""
    names = [name for name, _, _ in asked.constraints()]
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(asked, name)
        if value is not None and value not in neutral:
            names.append(name)
    if names:
        raise ApiError(f"{names[0]} does not go with a cascade: leave it out, or ask the model itself", param=names[0])


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _for_header(text: str) -> str:
    """What a header can carry of a name that another server gave."""
    return "".join(each if "!" <= each <= "~" or each == " " else "?" for each in text)[:128]
