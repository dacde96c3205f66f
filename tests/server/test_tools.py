"""Tools in prompts, and calls read back from answers however these are cut into pieces."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from accel.errors import OptionError
from accel.server.grammar import Grammars
from accel.server.tool_calls import CLOSE, OPEN, Delta, ToolParser
from accel.server.tools import ToolFormat

TOKENIZER = byte_tokenizer()
END = 0
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "$defs": {"city": {"enum": ["Bern", "Köln"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock"}},
]
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
# what the default model's template looks like: a role and a text
PLAIN = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{% for message in messages %}"
    "<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}"
)
BARE = "{{ tools }}" + PLAIN
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 1}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Wetter?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "12:00"}]},
    {"role": "user", "content": "Danke"},
]


def format_of(template: str | None) -> ToolFormat:
    return ToolFormat(SimpleNamespace(chat_template=template))


# -- in prompts


def test_a_template_without_tools_is_given_the_published_prompt() -> None:
    messages, arguments = format_of(PLAIN).messages([{"role": "user", "content": "hi"}], TOOLS, "auto")
    assert arguments == {}
    assert [message["role"] for message in messages] == ["system", "user"]
    shown = messages[0]["content"]
    assert shown.startswith("You are an expert in composing functions.")
    begin, end = shown.index("<tools>") + 7, shown.index("</tools>")
    assert json.loads(shown[begin:end]) == [tool["function"] for tool in TOOLS]


def test_the_conversations_own_system_message_stays_in_front() -> None:
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    messages, _ = format_of(PLAIN).messages(own, TOOLS, "auto")
    assert len(messages) == 2 and messages[0]["content"].startswith("Be brief.\n\nYou are an expert")
    assert own[0]["content"] == "Be brief."


@pytest.mark.parametrize("template", [PLAIN, None, HERMES])
def test_no_tools_leave_a_conversation_as_it_is(template: str | None) -> None:
    plain = [{"role": "system", "content": "x"}, {"role": "user", "content": "hi", "name": "me"}]
    for tools, choice in (([], "none"), ([], None), (TOOLS, "none")):
        assert format_of(template).messages(plain, tools, choice) == (plain, {})


def test_a_named_tool_is_the_only_one_shown() -> None:
    messages, _ = format_of(PLAIN).messages(HISTORY[:1], TOOLS, CLOCK)
    assert "clock" in messages[0]["content"] and "weather" not in messages[0]["content"]
    assert format_of(HERMES).messages(HISTORY[:1], TOOLS, CLOCK)[1] == {"tools": TOOLS[1:]}


def test_calls_and_results_become_text_where_a_template_knows_neither() -> None:
    messages, _ = format_of(PLAIN).messages(HISTORY, [], "none")
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "user"]
    text = messages[1]["content"]
    assert text.startswith(OPEN) and text.endswith(CLOSE)
    call = {"name": "weather", "arguments": {"city": "Bern", "days": 1}}
    assert json.loads(text[len(OPEN) : -len(CLOSE)]) == [call]
    results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n12:00\n</tool_response>"
    assert messages[2] == {"role": "user", "content": results}
    rendered = Environment().from_string(PLAIN).render(messages=messages)
    assert "None" not in rendered and rendered.endswith("<user>Danke")


def test_text_beside_calls_stays() -> None:
    messages, _ = format_of(PLAIN).messages([HISTORY[1] | {"content": "I look."}], [], "none")
    assert messages[0]["content"].startswith(f"I look.\n{OPEN}[")


def test_what_the_model_wrote_reads_back_as_the_same_call() -> None:
    messages, _ = format_of(PLAIN).messages(HISTORY, [], "none")
    _, calls = read(ToolParser(["weather"]), [messages[1]["content"]])
    assert calls == [("weather", CALL["function"]["arguments"])]  # type: ignore[index]


def test_a_template_with_tools_gets_them_and_arguments_as_objects() -> None:
    messages, arguments = format_of(HERMES).messages(HISTORY, TOOLS, "auto")
    assert arguments == {"tools": TOOLS}
    rendered = Environment().from_string(HERMES).render(messages=messages, **arguments)
    assert "<assistant><tool_call>Bern</tool_call><tool>sunny" in rendered
    assert HISTORY[1]["content"] is None and isinstance(CALL["function"]["arguments"], str)  # type: ignore[index]


def test_arguments_that_are_no_json_are_shown_as_they_are() -> None:
    broken = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}
    messages, _ = format_of(PLAIN).messages([broken], [], "none")
    assert json.loads(messages[0]["content"][len(OPEN) : -len(CLOSE)]) == [{"name": "f", "arguments": "{oops"}]


def test_a_template_may_have_variants() -> None:
    variants = SimpleNamespace(chat_template={"default": PLAIN, "tool_use": HERMES})
    assert ToolFormat(variants).messages(HISTORY[:1], TOOLS, "auto")[1] == {"tools": TOOLS}


@pytest.mark.parametrize(
    ("choice", "why"),
    [({"type": "function", "function": {"name": "nope"}}, "unknown tool 'nope'"), ("sometimes", "unknown tool_choice")],
)
def test_choices_that_do_not_exist_are_refused(choice: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        format_of(PLAIN).messages(HISTORY, TOOLS, choice)


# -- forced by a grammar


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, len(TOKENIZER), frozenset({END}))


def random_answer(grammar: Any, seed: int) -> str:
    """What a model that knows nothing writes."""
    processor, tokens = grammar.processor(0), list[int]()
    generator = torch.Generator().manual_seed(seed)
    while END not in tokens:
        scores = torch.randn(1, len(TOKENIZER), generator=generator)
        tokens.append(int(processor(torch.tensor([tokens], dtype=torch.long), scores).argmax()))
        assert len(tokens) < 3000
    text: str = TOKENIZER.decode(tokens[:-1])
    return text


@pytest.mark.parametrize("template", [PLAIN, HERMES, BARE], ids=["list", "each", "bare"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_answers_are_calls_with_valid_arguments(grammars: Grammars, template: str, parallel: bool) -> None:
    tools = format_of(template)
    grammar = tools.grammar(grammars, TOOLS, "required", parallel=parallel)
    names, most = set(), 0
    for seed in range(8):
        text = random_answer(grammar, seed)
        content, calls = read(tools.parser(TOOLS, "required"), list(text))
        assert content == "" and calls
        for name, arguments in calls:
            schema = WEATHER if name == "weather" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(arguments), schema)
            names.add(name)
        most = max(most, len(calls))
    assert names == {"weather", "clock"}
    assert most > 1 if parallel else most == 1


def test_a_named_tool_is_called_and_no_other(grammars: Grammars) -> None:
    tools = format_of(PLAIN)
    grammar = tools.grammar(grammars, TOOLS, CLOCK)
    for seed in range(4):
        _, calls = read(tools.parser(TOOLS, CLOCK), [random_answer(grammar, seed)])
        assert {name for name, _ in calls} == {"clock"}


def test_what_is_not_forced_has_no_grammar(grammars: Grammars) -> None:
    assert all(format_of(PLAIN).grammar(grammars, TOOLS, choice) is None for choice in ("auto", "none", None))


def test_arguments_have_no_names_but_those_described(grammars: Grammars) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"const": 1}}}}}]
    grammar = format_of(PLAIN).grammar(grammars, tools, "required", parallel=False)
    assert grammar is not None
    texts = {random_answer(grammar, seed) for seed in range(12)}
    shown = ("{}", '{"a": 1}')
    assert texts == {f'{OPEN}[{{"name": "f", "arguments": {arguments}}}]{CLOSE}' for arguments in shown}


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ([], "needs tools"),
        ([{"function": {"name": "f", "parameters": {"type": "array"}}}], "they must be an object"),
        ([{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "foo"}}}}}], "Invalid type: foo"),
    ],
)
def test_tools_that_cannot_be_forced_are_refused(grammars: Grammars, tools: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        format_of(PLAIN).grammar(grammars, tools, "required")


# -- in answers


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an answer, put together as a client does it."""
    deltas: list[Delta] = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    content, calls, ids = "", list[list[str]](), set[str]()
    for delta in deltas:
        if delta.content is not None:
            assert delta.content
            content += delta.content
            continue
        if delta.id is not None:
            # a call begins once, with all that names it
            assert delta.index == len(calls) and delta.name and delta.id not in ids
            ids.add(delta.id)
            calls.append([delta.name, ""])
        else:
            assert delta.name is None and delta.index == len(calls) - 1
        calls[delta.index][1] += delta.arguments or ""
    return content, [(name, arguments) for name, arguments in calls]


ONE = '{"name": "f", "arguments": {"x": [1, {"y": "}\\"<tool_call>"}], "z": -1.5e3}}'
ARGUMENTS = '{"x": [1, {"y": "}\\"<tool_call>"}], "z": -1.5e3}'
# text → (content, calls)
ANSWERS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "": ("", []),
    " Just text. \n": (" Just text. \n", []),
    "a < b, <tool, <tool_cal": ("a < b, <tool, <tool_cal", []),
    f"{OPEN}[{ONE}]{CLOSE}": ("", [("f", ARGUMENTS)]),
    f"{OPEN}[\n{ONE},\n{ONE}\n]{CLOSE}\n": ("", [("f", ARGUMENTS)] * 2),
    f"I look.\n\n{OPEN}\n{ONE}\n{CLOSE}\n{OPEN}\n{ONE}\n{CLOSE}": ("I look.", [("f", ARGUMENTS)] * 2),
    f"{OPEN}{ONE}{CLOSE} and then": (" and then", [("f", ARGUMENTS)]),
    f"{OPEN}[]{CLOSE}": ("", []),
    f'{OPEN}{{"arguments": {ARGUMENTS}, "name": "f"}}{CLOSE}': ("", [("f", ARGUMENTS)]),
    f'{OPEN}{{"id": 3, "name": "f", "parameters": {{}}, "type": "function"}}{CLOSE}': ("", [("f", "{}")]),
    f'{OPEN}{{"name": "f"}}{CLOSE}': ("", [("f", "{}")]),
    f'{OPEN}{{"name": "f", "arguments": {json.dumps(ARGUMENTS)}}}{CLOSE}': ("", [("f", ARGUMENTS)]),
    # cut off
    f'x{OPEN}[{{"name": "f", "argu': (f'x{OPEN}[{{"name": "f", "argu', []),
    f"x {OPEN}": (f"x {OPEN}", []),
    f'{OPEN}[{{"name": "f", "arguments": {{"x": "tr': ("", [("f", '{"x": "tr')]),
    f"{OPEN}[{ONE}]{CLOSE[:5]}": ("", [("f", ARGUMENTS)]),
    f"{OPEN}[{ONE[:-1]}": ("", [("f", ARGUMENTS)]),
    # no calls
    f'{OPEN}{{"name": "g", "arguments": {{}}}}{CLOSE}': (f'{OPEN}{{"name": "g", "arguments": {{}}}}{CLOSE}', []),
    f"a {OPEN}hm{CLOSE} b": (f"a {OPEN}hm{CLOSE} b", []),
    f"{OPEN}{{}}{CLOSE}": (f"{OPEN}{{}}{CLOSE}", []),
    f'{OPEN}{{"name": "f", "arguments": 3}}{CLOSE}': (f'{OPEN}{{"name": "f", "arguments": 3}}{CLOSE}', []),
    f'{OPEN}{{"name": "f", "arguments": "3"}}{CLOSE}': (f'{OPEN}{{"name": "f", "arguments": "3"}}{CLOSE}', []),
    f'{OPEN}{{"name": 3}}{CLOSE}{OPEN}{ONE}{CLOSE}': (f'{OPEN}{{"name": 3}}{CLOSE}', [("f", ARGUMENTS)]),
    ONE: (ONE, []),
    # wrong in the middle: what was told stays told, the rest is text
    f'{OPEN}{{"name": "f", "arguments": {{"x": 01}}}}{CLOSE}': ("}}" + CLOSE, [("f", '{"x": 01')]),
    f'{OPEN}[{ONE}, {{"name": "g"}}]{CLOSE}': (f', {{"name": "g"}}]{CLOSE}', [("f", ARGUMENTS)]),
    OPEN + '{"name": "f", "arguments": {"x": ' + "[" * 200: ("[" * 101, [("f", '{"x": ' + "[" * 99)]),
}


def pieces_of(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("text", ANSWERS, ids=lambda text: text[:60])
def test_answers_read_the_same_however_they_come(text: str) -> None:
    for size in (max(1, len(text)), 1, 2, 5, 11):
        assert read(ToolParser(["f"]), pieces_of(text, size)) == ANSWERS[text], size


PARTS = st.sampled_from([OPEN, CLOSE, ONE, "[", "]", ", ", "\n", "text", '"', "{", "}", "<", "\\", "1"])


@given(st.lists(PARTS, max_size=12).map("".join), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.booleans())
def test_pieces_do_not_matter_and_nothing_is_lost(text: str, sizes: list[int], bare: bool) -> None:
    pieces, at, turn = list[str](), 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(pieces[-1]), turn + 1
    whole = read(ToolParser(["f"], bare=bare), [text])
    assert read(ToolParser(["f"], bare=bare), pieces) == whole
    content, calls = whole
    if not calls and f"{OPEN}[]" not in "".join(text.split()) and not text.strip().startswith("["):
        assert content == text
    assert text.count("text") == content.count("text")


def test_arguments_come_in_pieces() -> None:
    parser = ToolParser(["f"])
    parser.feed(f'{OPEN}[{{"name": "f", "argum')
    assert parser.feed('ents": ') == []
    (begin, first) = parser.feed("{")
    assert first.arguments == "{"
    assert (begin.index, begin.name, begin.arguments) == (0, "f", "")
    assert begin.id is not None and begin.id.startswith("call_")
    assert [delta.arguments for delta in parser.feed('"x": "a')] == ['"x": "a']
    assert [delta.arguments for delta in parser.feed('b"}}')] == ['b"}']
    assert parser.feed(f"]{CLOSE}") == [] == parser.finish()


def test_text_is_told_as_soon_as_it_is_known_to_be_text() -> None:
    parser = ToolParser(["f"])
    told = [[delta.content for delta in parser.feed(piece)] for piece in ("Hi", " <", "b>", "<tool_", "x")]
    assert told == [["Hi"], [], [" <b>"], [], ["<tool_x"]]


@pytest.mark.parametrize("text", [ONE, f"[{ONE}]", f" [{ONE} ] "])
def test_forced_answers_may_be_bare_json(text: str) -> None:
    for size in (1, 4, 200):
        assert read(ToolParser(["f"], bare=True), pieces_of(text, size)) == ("", [("f", ARGUMENTS)])
    assert read(ToolParser(["f"]), [text]) == (text, [])


def test_ids_are_all_different() -> None:
    deltas = ToolParser(["f"]).feed(f"{OPEN}[{ONE},{ONE}]{CLOSE}") + ToolParser(["f"]).feed(f"{OPEN}{ONE}{CLOSE}")
    ids = [delta.id for delta in deltas if delta.id]
    assert len(set(ids)) == 3
