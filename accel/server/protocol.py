"""What requests may say: OpenAI's fields and vLLM's, by their names. Types are strict, because a string is no number.

Knows neither models nor tokenizers; what depends on those is checked where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from accel.server.errors import ApiError

INT64 = 2**63
# room for whatever a context can hold, and an integer that any machine can
MANY = 2**31 - 1
MAX_STOPS = 16

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
TokenId = Annotated[int, Field(ge=0, le=MANY)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Scalar = bool | int | float | str | None

# fields that would change the answer and that are not here: None and these values leave it as it is
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class Body(BaseModel):
    """Any request. Fields that it does not know are kept apart: the app logs their names."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _supported(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise ApiError(f"{name} is not supported by this server: leave it out", param=name)
        return self


class Part(BaseModel):
    """Settings inside a request: an unknown name among them is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Part):
    include_usage: bool | None = None
    # usage so far with every chunk
    continuous_usage_stats: bool | None = None
    # OpenAI's padding against listeners, which nothing here needs
    include_obfuscation: bool | None = None


class CascadeFields(Part):
    """How a cascade decides about this request. Who is asked, and what is read or written, is the server's choice."""

    samples: int | None = Field(default=None, ge=1, le=64)
    threshold: float | None = Field(default=None, gt=0, le=1)
    compare: Literal["exact", "normalised", "json", "code"] | None = None
    action_marker: str | None = Field(default=None, max_length=256)
    early_exit: Literal["always", "auto", "never"] | None = None
    demonstrations: int | None = Field(default=None, ge=0, le=32)
    window: int | None = Field(default=None, ge=1, le=32)
    temperature: float | None = Field(default=None, ge=0, le=2)
    teacher_temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1, le=MANY)
    stop: list[Stop] | None = Field(default=None, max_length=MAX_STOPS)
    seed: int | None = Field(default=None, ge=-INT64, le=INT64 - 1)
    # no more than the server gives
    student_seconds: float | None = Field(default=None, gt=0, le=1e6)
    teacher_seconds: float | None = Field(default=None, gt=0, le=1e6)
    without_teacher: Literal["error", "student"] | None = None


class AccelFields(Part):
    """How this request is decoded, where that differs from how the server was started."""

    method: Name | None = None
    # answer by the server's cascade, as the method "cascade" and its name as a model do
    cascade: CascadeFields | None = None
    cartridges: list[Name] | None = Field(default=None, max_length=16)
    options: dict[Name, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=32)
    # contexts are reused among requests of one salt
    salt: str = Field(default="", max_length=256)
    # the request's figures, under "accel" in the response
    stats: bool = False


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", populate_by_name=True, serialize_by_alias=True)

    name: str = Field(default="", max_length=256)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' needs the field json_schema, and no other type takes it")
        return self


class StructuredOutputs(Part):
    """vLLM's constraints on the text; one of them."""

    # "json" would hide pydantic's own method
    schema_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[Stop] | None = Field(default=None, min_length=1, max_length=256)
    grammar: str | None = None
    json_object: bool | None = None

    _NAMES: ClassVar[dict[str, str]] = {"schema_": "json"}

    def given(self) -> dict[str, Any]:
        """What is asked for, by its name in the request."""
        named = {self._NAMES.get(name, name): getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in named.items() if value not in (None, False)}

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.given()) > 1:
            raise ValueError(f"give one of {', '.join(self.given())}")
        return self


class Generation(Body):
    """What every request for text may say."""

    n: int | None = Field(default=None, ge=1, le=MANY)
    seed: int | None = Field(default=None, ge=-INT64, le=INT64 - 1)
    max_tokens: int | None = Field(default=None, ge=0, le=MANY)
    min_tokens: int | None = Field(default=None, ge=0, le=MANY)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    # -1 and 0: all
    top_k: int | None = Field(default=None, ge=-1, le=MANY)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    stop: Stop | list[Stop] | None = Field(default=None, max_length=256)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=256)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[Stop] | None = Field(default=None, min_length=1, max_length=256)
    guided_grammar: str | None = None
    add_special_tokens: bool | None = None
    # vLLM's name for accel.salt
    cache_salt: str | None = Field(default=None, max_length=256)
    # seconds after which the answer ends with "abort"
    timeout: float | None = Field(default=None, gt=0, le=1e6)
    accel: AccelFields | None = None

    @model_validator(mode="after")
    def _together(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for requests with stream: true", param="stream_options")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise ApiError(f"stop has {len(self.stop)} strings: at most {MAX_STOPS} are allowed", param="stop")
        if len(self.constraints()) > 1:
            names = ", ".join(name for name, _, _ in self.constraints())
            raise ApiError(f"{names}: give one description of what the text must be", param="structured_outputs")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def constraints(self) -> list[tuple[str, str, Any]]:
        """(field, kind, value) of what the text must be; kinds are those of ``structured_outputs``."""
        found: list[tuple[str, str, Any]] = []
        if self.response_format is not None and self.response_format.type == "json_object":
            found.append(("response_format", "json_object", True))
        if self.response_format is not None and self.response_format.json_schema is not None:
            found.append(("response_format", "json", self.response_format.json_schema.json_schema))
        if self.structured_outputs is not None:
            found += [("structured_outputs", kind, value) for kind, value in self.structured_outputs.given().items()]
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append((f"guided_{kind}", kind, value))
        return found


Prompt = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=MANY)


class TextPart(Part):
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class _Message(BaseModel):
    """One message of a conversation; the template decides what it makes of fields beyond these."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: str | None = None


class TextMessage(_Message):
    role: Literal["system", "developer", "user"]
    content: str | list[TextPart]


class ToolMessage(_Message):
    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str | None = None


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


Message = Annotated[TextMessage | ToolMessage | AssistantMessage, Field(discriminator="role")]


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Part):
    type: Literal["function"] = "function"
    function: FunctionTool


class ChosenFunction(Part):
    name: str


class ChosenTool(Part):
    type: Literal["function"] = "function"
    function: ChosenFunction


class Conversation(BaseModel):
    """What of a chat becomes the prompt."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    # up to where the answer begins, unless the last message is to be continued
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[Name, Scalar] | None = Field(default=None, max_length=32)

    @model_validator(mode="after")
    def _one_end(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        if self.continue_final_message and self.messages[-1].content is None:
            raise ApiError("continue_final_message needs a last message with content", param="messages")
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise ApiError(
                f"tool_choice names {self.tool_choice.function.name[:64]!r}: no such tool", param="tool_choice"
            )
        if self.tool_choice == "required" and not names:
            raise ApiError("tool_choice 'required' needs tools", param="tool_choice")
        return self


class ChatRequest(Conversation, Generation):
    """POST /v1/chat/completions"""

    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MANY)
    # OpenAI's newer name for max_tokens
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MANY)
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs is for requests with logprobs: true", param="top_logprobs")
        forced = self.tool_choice == "required" or isinstance(self.tool_choice, ChosenTool)
        if forced and self.constraints():
            raise ApiError("a forced tool call cannot have a format of its own", param="tool_choice")
        return self


class EmbeddingRequest(Body):
    """POST /v1/embeddings"""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    # of another size than the model's: refused
    dimensions: int | None = Field(default=None, ge=1, le=MANY)
    add_special_tokens: bool | None = None


class TokenizeText(Body):
    """POST /tokenize, a text"""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation, Body):
    """POST /tokenize, a conversation"""

    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    tokens: list[TokenId]
