"""From a checked request to jobs for the engine. Everything here may take time and runs off the event loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import accel
from accel import methods
from accel.engine.jobs import Job
from accel.errors import OptionError, unknown_name
from accel.server.choices import Vocabulary
from accel.server.errors import ApiError, api_error
from accel.server.generation import Cut
from accel.server.grammar import Grammar, Grammars
from accel.server.prompts import Prompts
from accel.server.protocol import AccelFields, ChatRequest, CompletionRequest, Conversation, Generation
from accel.server.sampling import SamplingFields, defaults, sampling_for
from accel.server.settings import ServerSettings
from accel.server.text import Decode
from accel.server.tools import ToolFormat

# OpenAI's, for completions that do not say
COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Prepared:
    """What a request asks of the engine, and how its tokens become text."""

    jobs: list[Job]
    cut: Cut
    decode: Decode


class Preparer:
    """Makes jobs for one model."""

    def __init__(self, model: accel.Model, settings: ServerSettings) -> None:
        self.prompts = Prompts(model, settings.max_prompt_tokens)
        self.vocabulary = Vocabulary(model.tokenizer)
        self.tools = ToolFormat(model.tokenizer)
        self._settings = settings
        self._vocab_size = model.model.get_input_embeddings().num_embeddings
        self._ends = end_tokens(model)
        self._defaults = defaults(model.model)
        self._grammars = Grammars(model.tokenizer, self._vocab_size, self._ends)

    def check(self, request: Generation, num_prompts: int = 1) -> int:
        """Refuse what no tokenising could make right; how many continuations of each prompt are asked for."""
        settings, n = self._settings, request.n or 1
        if n > settings.max_n:
            raise ApiError(f"n={n}: at most {settings.max_n} are allowed here", param="n")
        if num_prompts > settings.max_prompts:
            raise ApiError(f"{num_prompts} prompts: at most {settings.max_prompts} are allowed here", param="prompt")
        field, asked = logprobs_asked(request)
        if asked is not None and asked > settings.max_logprobs:
            raise ApiError(f"{field}={asked}: at most {settings.max_logprobs} are allowed here", param=field)
        for token in request.stop_token_ids or ():
            self._in_vocabulary(token, "stop_token_ids")
        for key in request.logit_bias or ():
            self._in_vocabulary(int(key), "logit_bias")
        if request.accel is not None:
            check_method(request.accel)
        return n

    def completion(self, request: CompletionRequest) -> Prepared:
        special = request.add_special_tokens is not False
        prompts = self.prompts.read(request.prompt, cartridges_of(request), special=special)
        asked = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        if asked == 0 and not request.echo:
            raise ApiError("max_tokens=0 is for requests with echo: true", param="max_tokens")
        grammar = self._grammar(request)
        prompt_logprobs = request.logprobs if request.echo else None
        return self._prepared(request, prompts, asked, "prompt", grammar, request.logprobs, prompt_logprobs)

    def chat(self, request: ChatRequest) -> Prepared:
        tools = self._tool_arguments(request)
        grammar = self._grammar(request)
        if tools[0] and grammar is None:
            parallel = request.parallel_tool_calls is not False
            grammar = _on_request("tools", lambda: self.tools.grammar(self._grammars, *tools, parallel=parallel))
        prompt = self.conversation(request, cartridges_of(request), special=bool(request.add_special_tokens))
        asked = request.max_completion_tokens or request.max_tokens
        _, logprobs = logprobs_asked(request)
        return self._prepared(request, [prompt], asked, "messages", grammar, logprobs, None)

    def conversation(
        self, chat: Conversation, cartridges: Sequence[str] | None = None, *, special: bool = False
    ) -> list[int]:
        """Token ids of a conversation, tools included."""
        tools = self._tool_arguments(chat)
        return self.prompts.conversation(
            chat, cartridges, lambda messages: self.tools.messages(messages, *tools), special=special
        )

    def tool_parser(self, request: ChatRequest) -> Any:
        """Finds calls in an answer; None where there are no tools to call."""
        tools, choice = self._tool_arguments(request)
        return self.tools.parser(tools, choice) if tools and choice != "none" else None

    def _tool_arguments(self, chat: Conversation) -> tuple[list[dict[str, Any]], Any]:
        tools = [tool.model_dump(exclude_none=True) for tool in chat.tools or ()]
        choice = chat.tool_choice
        if choice is None:
            return tools, "auto" if tools else "none"
        return tools, choice if isinstance(choice, str) else choice.model_dump()

    def _prepared(
        self,
        request: Generation,
        prompts: Sequence[list[int]],
        asked: int | None,
        param: str,
        grammar: Grammar | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Prepared:
        extension = request.accel or AccelFields()
        named = frozenset(request.stop_token_ids or ())
        stop_tokens = named if request.ignore_eos else named | self._ends
        default = self._settings.default_max_tokens
        limits = [each for each in (request.timeout, self._settings.request_timeout) if each is not None]
        taken = self.prompts.positions(extension.cartridges)
        jobs = []
        for prompt in prompts:
            # what reads the prompt only still needs a token to be asked for
            new = max(1, self.prompts.room(len(prompt), asked, default, param, taken=taken))
            if (request.min_tokens or 0) > new:
                raise ApiError(
                    f"min_tokens={request.min_tokens}: at most {new} tokens are generated", param="min_tokens"
                )
            do_sample, pipeline = sampling_for(self._fields(request, stop_tokens), prompt=prompt, grammar=grammar)
            jobs.append(
                Job(
                    prompt=prompt,
                    max_new_tokens=new,
                    n=request.n or 1,
                    do_sample=do_sample,
                    seed=request.seed,
                    pipeline=pipeline,
                    stop_tokens=stop_tokens,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    cartridges=None if extension.cartridges is None else tuple(extension.cartridges),
                    method=extension.method,
                    options=extension.options,
                    salt=extension.salt or request.cache_salt or "",
                    timeout=min(limits, default=None),
                )
            )
        cut = Cut(
            request.stops,
            include=bool(request.include_stop_str_in_output),
            min_tokens=request.min_tokens or 0,
            named_tokens=named,
            silent=asked == 0,
        )
        skip = request.skip_special_tokens is not False
        return Prepared(jobs, cut, self.vocabulary.decode if skip else self.vocabulary.decode_all)

    def _fields(self, request: Generation, stop_tokens: frozenset[int]) -> SamplingFields:
        given: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(0, request.top_k),
            "min_p": request.min_p,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "repetition_penalty": request.repetition_penalty,
            "logit_bias": {int(key): bias for key, bias in (request.logit_bias or {}).items()} or None,
            "min_tokens": request.min_tokens,
        }
        told = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self._defaults, stop_tokens=stop_tokens, **told)

    def _grammar(self, request: Generation) -> Grammar | None:
        for field, kind, value in request.constraints():
            return _on_request(field, lambda kind=kind, value=value: self._compiled(kind, value))
        return None

    def _compiled(self, kind: str, value: Any) -> Grammar:
        grammars = self._grammars
        if kind == "json_object":
            return grammars.json_object()
        if kind == "json":
            return grammars.json_schema(_schema(value))
        if kind == "regex":
            return grammars.regex(value)
        if kind == "choice":
            return grammars.lark("start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value))
        return grammars.lark(value)

    def _in_vocabulary(self, token: int, param: str) -> None:
        if token >= self._vocab_size:
            raise ApiError(f"{param}: {token} is out of vocabulary: ids are 0 to {self._vocab_size - 1}", param=param)


def logprobs_asked(request: Generation) -> tuple[str, int | None]:
    """The field that says of how many tokens log-probabilities are asked for, and its value."""
    if isinstance(request, ChatRequest):
        return "top_logprobs", (request.top_logprobs or 0) if request.logprobs else None
    return "logprobs", request.logprobs if isinstance(request, CompletionRequest) else None


def cartridges_of(request: Generation) -> list[str] | None:
    return None if request.accel is None else request.accel.cartridges


def check_method(extension: AccelFields) -> None:
    """Only what belongs to a decoder may come with a request, and nothing that names files."""
    decoders = {name: info for name, info in methods.TABLE.items() if info.axis == "decoder"}
    if extension.method is not None and extension.method not in decoders:
        raise ApiError(unknown_name("method", extension.method, decoders), param="accel.method")
    asked = [extension.method] if extension.method is not None else list(decoders)
    classes = [cls for name in asked if (cls := decoders[name].load_options()) is not None]
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    for name in extension.options:
        if name not in known:
            raise ApiError(unknown_name("option", name, known), param="accel.options")


def end_tokens(model: accel.Model) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config, else of the config, else of the tokenizer."""
    generation_config = getattr(model.model, "generation_config", None)
    for holder in (generation_config, model.model.config, model.tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"the schema is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("the schema is no object")
    return value


def _on_request(param: str, make: Any) -> Any:
    """What ``make`` refuses is the fault of the field ``param``."""
    try:
        return make()
    except OptionError as error:
        refused = api_error(error)
        refused.param = param
        raise refused from error
