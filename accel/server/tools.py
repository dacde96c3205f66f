"""Tools in prompts and calls in answers: how a model's chat template shows functions, and how it spells their calls.

Knows text and tokenizers, and nothing of HTTP. What an answer says is read by ``accel.server.tool_calls``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import OptionError, unknown_name
from accel.server.grammar import Grammar, Grammars
from accel.server.tool_calls import CLOSE, OPEN, Delta, ToolParser

__all__ = ["Delta", "ToolFormat", "ToolParser"]

Tool = Mapping[str, Any]
Choice = str | Mapping[str, Any] | None
# a forced answer has at most so many calls: a small model may not find an end
MAX_CALLS = 16
# as the prompt below shows calls, and as json.dumps writes
TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# SmolLM2's, as published for its template, which renders no tools
PROMPT = """\
You are an expert in composing functions. You are given a question and a set of possible functions.\x20
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\x20
If none of the functions can be used, point it out and refuse to answer.\x20
If the given question lacks the parameters required by the function, also point it out.

You have access to the following tools:
<tools>%s</tools>

The output MUST strictly adhere to the following format, and NO other text MUST be included.
The example format is as follows. Please make sure the parameter type is correct. If no function call is needed, \
please make the tool calls an empty list '[]'.
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},
... (more tool calls as required)
]</tool_call>"""


class ToolFormat:
    """How one model is told of tools and answers with calls.

    A template that mentions ``tools`` renders them itself; where its calls stand in ``<tool_call>``, there is one
    object in each (Hermes, Qwen). Others get SmolLM2's prompt, and write a list into one tag.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = _template(tokenizer)
        self._renders_tools = re.search(r"\btools\b", template) is not None
        # how calls are spelled: "list" (SmolLM2), "each" (Hermes), or "bare" JSON where the template has no tags
        if not self._renders_tools:
            self.spelling = "list"
        else:
            self.spelling = "each" if OPEN in template else "bare"

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], tool_choice: Choice
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The conversation as the template takes it, and arguments for ``apply_chat_template``."""
        shown = _offered(tools, tool_choice)
        if self._renders_tools:
            rendered = [_for_template(message) for message in messages]
            return rendered, {"tools": [dict(tool) for tool in shown]} if shown else {}
        told = _plainly(messages)
        if shown:
            functions = json.dumps([dict(tool["function"]) for tool in shown], ensure_ascii=False)
            told = _under(PROMPT % functions, told)
        return told, {}

    def grammar(
        self, grammars: Grammars, tools: Sequence[Tool], tool_choice: Choice, *, parallel: bool = True
    ) -> Grammar | None:
        """What the answer must match where calls are asked for; ``parallel``: whether there may be several."""
        if not _is_forced(tool_choice):
            return None
        offered = _offered(tools, tool_choice)
        if not offered:
            raise OptionError("tool_choice 'required' needs tools: give at least one")
        calls = [f"call: {' | '.join(f'call_{place}' for place in range(len(offered)))}"]
        for place, tool in enumerate(offered):
            function = tool["function"]
            head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            schema = json.dumps(_arguments(function.get("parameters")))
            calls.append(f'call_{place}: {json.dumps(head)} arguments_{place} "}}"\narguments_{place}: %json {schema}')
        return grammars.lark("\n".join([self._start(MAX_CALLS if parallel else 1), *calls]))

    def parser(self, tools: Sequence[Tool], tool_choice: Choice) -> ToolParser:
        """Finds calls of these tools in an answer."""
        names = [tool["function"]["name"] for tool in _offered(tools, tool_choice)]
        return ToolParser(names, bare=_is_forced(tool_choice))

    def _start(self, most: int) -> str:
        """The rule for so many calls at most."""
        if self.spelling == "each":
            before, between, after = "", "\\n", ""
        else:
            before, between, after = (f"{OPEN}[", ", ", f"]{CLOSE}") if self.spelling == "list" else ("[", ", ", "]")
        # llguidance refuses a repetition of at most none
        others = f'("{between}" item){{0,{most - 1}}}' if most > 1 else ""
        item = f'"{OPEN}\\n" call "\\n{CLOSE}"' if self.spelling == "each" else "call"
        return f'start: "{before}" item {others} "{after}"\nitem: {item}'


def _template(tokenizer: Any) -> str:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return "\n".join(map(str, found.values()))
    return found or ""


def _is_forced(tool_choice: Choice) -> bool:
    return tool_choice == "required" or isinstance(tool_choice, Mapping)


def _offered(tools: Sequence[Tool], tool_choice: Choice) -> list[Tool]:
    """The tools that may be called: with "none" there are none, with a name one."""
    if isinstance(tool_choice, Mapping):
        name = (tool_choice.get("function") or {}).get("name")
        found = [tool for tool in tools if tool["function"]["name"] == name]
        if not found:
            raise OptionError(unknown_name("tool", str(name), (tool["function"]["name"] for tool in tools)))
        return found[:1]
    if tool_choice not in (None, "none", "auto", "required"):
        raise OptionError(unknown_name("tool_choice", str(tool_choice), ("none", "auto", "required")))
    return [] if tool_choice == "none" else list(tools)


def _arguments(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema that arguments must match: an object, and no names of the model's own where some are given."""
    schema = dict(parameters or {"properties": {}})
    schema.setdefault("type", "object")
    if schema["type"] != "object":
        raise OptionError(f"the parameters of a tool are of type {schema['type']!r}: they must be an object")
    others = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")
    if "properties" in schema and not any(name in schema for name in others):
        schema.setdefault("additionalProperties", False)
    return schema | {"x-guidance": TIGHT}


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it: arguments as objects, and text where there is none."""
    shown = dict(message)
    if shown.get("content") is None:
        shown["content"] = ""
    if shown.get("tool_calls"):
        calls = [dict(call) | {"function": _function(call)} for call in shown["tool_calls"]]
        shown["tool_calls"] = calls
    return shown


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    """Name and arguments of a call, these as an object wherever they are one."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = arguments
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def _plainly(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows neither calls nor their results: both as text."""
    told: list[dict[str, Any]] = []
    # whether the last message holds results, which follow one another in one message
    open_results = False
    for message in messages:
        content = _text(message.get("content"))
        if message["role"] == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if open_results:
                told[-1]["content"] += f"\n{result}"
            else:
                told.append({"role": "user", "content": result})
            open_results = True
            continue
        open_results = False
        calls = message.get("tool_calls")
        if calls:
            spelled = json.dumps([_function(call) for call in calls], ensure_ascii=False)
            content = f"{content}\n{OPEN}{spelled}{CLOSE}" if content else f"{OPEN}{spelled}{CLOSE}"
        rest = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
        told.append(rest | {"content": content})
    return told


def _under(prompt: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put ``prompt`` in front, behind the conversation's own system message where there is one."""
    if messages and messages[0]["role"] in ("system", "developer"):
        own = messages[0]
        return [own | {"content": f"{own['content']}\n\n{prompt}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def _text(content: Any) -> str:
    """Text of a message's content, which may come in parts."""
    if isinstance(content, list | tuple):
        return "".join(part.get("text", "") for part in content)
    return content or ""
