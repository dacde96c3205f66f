"""The HTTP app: OpenAI's routes in front of an engine that batches. Never blocks the loop on the model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

import accel
from accel.engine.service import Service
from accel.server import protocol
from accel.server.answers import Answer, ChatAnswer, CompletionAnswer
from accel.server.cascade import NONE_HERE, CascadeAnswer, CascadeDesk, cascade_name, wants_cascade
from accel.server.embeddings import embeddings
from accel.server.errors import ApiError, api_error
from accel.server.exchange import EventStream, Gone, parsed, read_body, unless_gone
from accel.server.generation import Generation, check_alive, reserve
from accel.server.guard import Guard
from accel.server.preparing import Prepared, Preparer
from accel.server.schema import described, document
from accel.server.settings import ServerSettings

if TYPE_CHECKING:
    from accel.server.metrics import Metrics

log = logging.getLogger("accel.server")

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request, Any], Awaitable[Response]]

# names that requests may make us remember
MAX_NAMES = 1000


def create_app(
    service: Service,
    model: accel.Model,
    settings: ServerSettings,
    metrics: Metrics | None = None,
    cascade: CascadeDesk | None = None,
) -> FastAPI:
    """The routes of one model behind ``service``, and of the cascade over it."""
    server = Server(service, model, settings, metrics, cascade)
    # pages of documentation would load scripts from elsewhere
    app = FastAPI(title="accel", version=accel.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_keys=settings.api_keys)
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(HTTPException, _refused)
    for path, body, handler in (
        ("/v1/chat/completions", protocol.ChatRequest, server.chat),
        ("/v1/completions", protocol.CompletionRequest, server.completions),
        ("/v1/embeddings", protocol.EmbeddingRequest, server.embeddings),
        ("/tokenize", (protocol.TokenizeText, protocol.TokenizeChat), server.tokenize),
        ("/detokenize", protocol.DetokenizeRequest, server.detokenize),
    ):
        route = server.answering(body, handler)
        app.post(path, response_model=None, **described(handler, body))(route)
    for path, answer in (
        ("/v1/models", server.models),
        ("/v1/models/{name:path}", server.one_model),
        ("/health", server.health),
        ("/version", server.version),
        ("/metrics", server.figures),
    ):
        app.get(path, response_model=None, **described(answer))(server.safe(answer))
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


class Server:
    """What the routes share."""

    def __init__(
        self,
        service: Service,
        model: accel.Model,
        settings: ServerSettings,
        metrics: Metrics | None,
        cascade: CascadeDesk | None,
    ) -> None:
        self.service = service
        self.settings = settings
        self.metrics = metrics
        self.cascade = cascade
        self.preparer = Preparer(model, settings)
        self._created = int(time.time())
        self._seen_names: set[str] = set()

    def answering(self, models: type[BaseModel] | tuple[type[BaseModel], type[BaseModel]], handler: Handler) -> Any:
        """A route that reads a body as one of ``models`` (the second where it has messages)."""

        async def route(request: Request) -> Response:
            body = await read_body(request, self.settings.max_body_bytes)
            choices = models if isinstance(models, tuple) else (models,)
            has_messages = isinstance(body, dict) and "messages" in body
            asked = parsed(choices[-1 if has_messages else 0], body)
            self._check_model(asked)
            self._log_unknown(asked)
            return await handler(request, asked)

        return self.safe(route)

    def safe(self, route: Callable[[Request], Awaitable[Response]]) -> Any:
        """The route with every error as a response."""

        async def answer(request: Request) -> Response:
            try:
                return await route(request)
            except Gone:
                # nobody reads it; the log of who serves us should not show a success
                return Response(status_code=499)
            except Exception as error:
                return api_error(error).response()

        return answer

    async def completions(self, request: Request, asked: protocol.CompletionRequest) -> Response:
        """Continue one or several prompts."""
        count = self.preparer.prompts.count(asked.prompt)

        def answer(generation: Generation) -> Answer:
            texts = self._texts(asked, generation) if asked.echo else []
            return CompletionAnswer(asked, generation, self.preparer.vocabulary, self.settings.model_name, texts)

        return await self._generate(request, asked, count, lambda: self.preparer.completion(asked), answer)

    async def chat(self, request: Request, asked: protocol.ChatRequest) -> Response:
        """Answer a conversation."""
        if wants_cascade(asked, cascade_name(self.settings)):
            return await self._cascaded(request, asked)

        def answer(generation: Generation) -> Answer:
            made = [self.preparer.tool_parser(asked) for _ in generation.choices]
            parsers = [parser for parser in made if parser is not None]
            begun = _last_text(asked) if asked.echo and asked.continue_final_message else ""
            vocabulary, name = self.preparer.vocabulary, self.settings.model_name
            return ChatAnswer(asked, generation, vocabulary, name, parsers, begun)

        return await self._generate(request, asked, 1, lambda: self.preparer.chat(asked), answer)

    async def embeddings(self, request: Request, asked: protocol.EmbeddingRequest) -> Response:
        """The last hidden state of each input's last token, normalised to length 1."""
        work = embeddings(self.service, self.preparer, self.settings, asked)
        return JSONResponse(await unless_gone(request.receive, work))

    async def tokenize(self, request: Request, asked: protocol.TokenizeText | protocol.TokenizeChat) -> Response:
        """Token ids of a text or of a conversation."""
        if isinstance(asked, protocol.TokenizeChat):
            tokens = await asyncio.to_thread(self.preparer.conversation, asked)
        else:
            special = asked.add_special_tokens is not False
            tokens = await asyncio.to_thread(self.preparer.prompts.text, asked.prompt, special=special)
        names = [self.preparer.vocabulary.text(token) for token in tokens] if asked.return_token_strs else None
        length = self.preparer.prompts.context_length
        return JSONResponse({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": names})

    async def detokenize(self, request: Request, asked: protocol.DetokenizeRequest) -> Response:
        """Text of token ids, special ones included."""
        self.preparer.prompts.check_ids(asked.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self.preparer.vocabulary.decode_all, asked.tokens)})

    async def models(self, request: Request) -> Response:
        """What is served."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._names()]})

    async def one_model(self, request: Request) -> Response:
        """One of the models."""
        name = request.path_params["name"]
        self._check_name(name)
        return JSONResponse(self._card(name))

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        check_alive(self.service)
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """The version of accel."""
        return JSONResponse({"version": accel.__version__})

    async def figures(self, request: Request) -> Response:
        """Prometheus metrics."""
        if self.metrics is None:
            raise ApiError("this server was started without metrics", status=404)
        body, kind = self.metrics.render()
        return Response(body, media_type=kind)

    async def _generate(
        self,
        request: Request,
        asked: protocol.Generation,
        num_prompts: int,
        prepare: Callable[[], Prepared],
        answer: Callable[[Generation], Answer],
    ) -> Response:
        arrived = time.perf_counter()
        n = self.preparer.check(asked, num_prompts)
        # before the prompt is read: what finds no room should cost nothing
        tickets = reserve(self.service, [n] * num_prompts)
        try:
            prepared = await unless_gone(request.receive, asyncio.to_thread(prepare))
        except BaseException:
            for ticket in tickets:
                ticket.release()
            raise
        jobs, cut, decode = prepared.jobs, prepared.cut, prepared.decode
        generation = Generation(self.service, jobs, tickets, decode, cut, self.metrics, arrived)
        try:
            shown = answer(generation)
            generation.start()
        except BaseException:
            generation.close()
            raise
        if asked.stream:
            return EventStream(generation, shown)
        try:
            await unless_gone(request.receive, generation.run())
        finally:
            generation.close()
        return JSONResponse(shown.whole(), headers=shown.headers())

    async def _cascaded(self, request: Request, asked: protocol.ChatRequest) -> Response:
        if self.cascade is None:
            raise ApiError(NONE_HERE, param="accel")
        check_alive(self.service)
        run, shown = self.cascade.start(asked, self.metrics), CascadeAnswer(asked)
        if asked.stream:
            return EventStream(run, shown)
        try:
            body = shown.whole(await unless_gone(request.receive, run.run()))
        finally:
            run.close()
        return JSONResponse(body, headers=shown.headers())

    def _texts(self, asked: protocol.CompletionRequest, generation: Generation) -> Sequence[str]:
        """The prompts as they were given, or what their ids are."""
        if isinstance(asked.prompt, str):
            return [asked.prompt]
        decode = self.preparer.vocabulary.decode_all
        pairs = zip(asked.prompt, generation.jobs, strict=False)
        if isinstance(asked.prompt[0], int):
            return [decode(generation.jobs[0].prompt)]
        return [each if isinstance(each, str) else decode(job.prompt) for each, job in pairs]

    def _names(self) -> list[str]:
        return [self.settings.model_name, *([] if self.cascade is None else [self.cascade.name])]

    def _card(self, name: str) -> dict[str, Any]:
        root = self.settings.model_root or self.settings.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "accel",
            "root": root if name == self.settings.model_name else self.settings.model_name,
            "max_model_len": self.preparer.prompts.context_length,
        }

    def _check_model(self, asked: BaseModel) -> None:
        name = getattr(asked, "model", None)
        if name:
            self._check_name(name)
        if isinstance(asked, protocol.ChatRequest | protocol.TokenizeChat):
            return
        given = getattr(asked, "accel", None)
        is_named = bool(name) and name != self.settings.model_name
        if is_named or (given is not None and given.cascade is not None):
            where = "model" if is_named else "accel.cascade"
            raise ApiError("a cascade answers conversations: ask /v1/chat/completions", param=where)

    def _check_name(self, name: str) -> None:
        if name not in self._names():
            raise ApiError(
                f"The model `{name[:256]}` does not exist: /v1/models lists them.", status=404, param="model"
            )

    def _log_unknown(self, asked: BaseModel) -> None:
        """The names of fields that nothing here reads, each once: values may be private."""
        if not self.settings.log_unknown_fields:
            return
        for name in (asked.model_extra or {}).keys() - protocol.UNSUPPORTED.keys() - self._seen_names:
            if len(self._seen_names) < MAX_NAMES:
                self._seen_names.add(name)
                log.warning("requests have the field %s, which is ignored", ascii(name[:64]))


def _last_text(asked: protocol.ChatRequest) -> str:
    content = asked.messages[-1].content
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


async def _refused(request: Request, error: Exception) -> Response:
    """What the router says by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    return ApiError(f"{where}: {error.detail}", status=error.status_code, headers=error.headers).response()
