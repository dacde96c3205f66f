"""Calls of tools in text that comes in pieces. Knows how models spell them, and nothing of prompts or HTTP."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# values nested deeper than this are no arguments
MAX_NESTED = 100
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_SPACE = " \t\r\n"
# what may be missing behind the last call of a text that was cut off
_TAIL = re.compile(rf"[{_SPACE},\]}}]*({'|'.join(re.escape(CLOSE[:n]) for n in range(len(CLOSE)))})")
# reads on when there is more text
Reading = Generator[None, None, Any]


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text, or something of call ``index``, which begins with its ``id`` and ``name``."""

    content: str | None = None
    index: int = 0
    id: str | None = None
    name: str | None = None
    arguments: str | None = None


class _Malformed(Exception):
    """What follows the tag is no call."""


class _Ended(Exception):
    """The text ends in the middle of a call."""


class ToolParser:
    """Reads one answer. The deltas say the same however the text was cut into pieces.

    Calls stand in ``<tool_call>``, one object or a list of them; with ``bare`` also in no tag at all, as the whole
    answer. Each is an object with "name" and "arguments". What looks like the beginning of a tag waits for the rest.
    What is no call of a known function comes out as text, from where it goes wrong: nothing is lost but space next to
    calls, tags and empty lists of calls.
    """

    def __init__(self, names: Collection[str], *, bare: bool = False) -> None:
        self._names = frozenset(names)
        self._bare = bare
        self._text = ""
        # how far it has been read, and how far told
        self._place = 0
        self._told = 0
        self._ended = False
        self._num_calls = 0
        # whether what is being read are arguments that can be told at once
        self._in_arguments = False
        self._deltas: list[Delta] = []
        self._reading = self._read()

    def feed(self, text: str) -> list[Delta]:
        """What is known after more text."""
        self._text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the text."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Delta]:
        next(self._reading, None)
        self._tell_arguments()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read(self) -> Reading:
        if self._bare and (yield from self._begins_bare()):
            yield from self._calls("", "")
        while (yield from self._until_tag()):
            yield from self._calls(OPEN, CLOSE)

    def _begins_bare(self) -> Reading:
        try:
            yield from self._skip_space()
            if (yield from self._peek()) in "[{":
                return True
        except _Ended:
            pass
        self._place = 0
        return False

    def _until_tag(self) -> Reading:
        """Tell text up to the next tag; whether there is one."""
        while True:
            found = self._text.find(OPEN, self._place)
            if found >= 0:
                self._tell(len(self._text[:found].rstrip(_SPACE)))
                self._place = found
                return True
            if self._ended:
                # space behind calls belongs to them
                if not self._num_calls or self._text[self._told :].strip(_SPACE):
                    self._tell(len(self._text))
                return False
            end = len(self._text)
            self._place = end - next((n for n in range(len(OPEN) - 1, 0, -1) if self._text.endswith(OPEN[:n])), 0)
            self._tell(max(self._told, len(self._text[: self._place].rstrip(_SPACE))))
            yield

    def _calls(self, opening: str, closing: str) -> Reading:
        """A call or a list of them between tags."""
        before = self._num_calls
        try:
            yield from self._expect(opening)
            yield from self._skip_space()
            if (yield from self._peek()) == "[":
                yield from self._list(self._call, 0)
            else:
                yield from self._call(0)
            if closing:
                yield from self._skip_space()
                yield from self._expect(closing)
            self._told = self._place
        except _Malformed:
            self._end_arguments()
            self._tell(self._place)
        except _Ended:
            self._end_arguments()
            # a call that was told lacks nothing but brackets and the tag
            if self._num_calls > before and _TAIL.fullmatch(self._text, self._told):
                self._told = len(self._text)

    def _call(self, depth: int) -> Reading:
        """One object; told from where its arguments begin, if its name is known by then, and else at its end."""
        name: str | None = None
        arguments: str | None = None
        is_told = False
        yield from self._expect("{")
        yield from self._skip_space()
        while (yield from self._peek()) != "}":
            key = yield from self._key()
            if key == "name" and name is None:
                name = json.loads((yield from self._string()))
                if name not in self._names:
                    raise _Malformed
            elif key in ("arguments", "parameters") and arguments is None:
                if name is not None and (yield from self._peek()) == "{":
                    self._announce(name)
                    self._told, self._in_arguments, is_told = self._place, True, True
                arguments = yield from self._arguments()
                self._end_arguments()
            else:
                yield from self._value(depth + 1)
            if not (yield from self._more()):
                break
        yield from self._expect("}")
        if name is None:
            raise _Malformed
        if not is_told:
            self._announce(name)
            self._deltas.append(Delta(index=self._num_calls - 1, arguments=arguments or "{}"))
        self._told = self._place

    def _arguments(self) -> Reading:
        """An object as it is written, or as a string holds it."""
        begin = self._place
        if (yield from self._peek()) == "{":
            yield from self._object(1)
            return self._text[begin : self._place]
        held = json.loads((yield from self._string()))
        try:
            is_object = isinstance(json.loads(held), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise _Malformed
        return held

    def _announce(self, name: str) -> None:
        self._deltas.append(Delta(index=self._num_calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name, arguments=""))
        self._num_calls += 1

    def _tell(self, end: int) -> None:
        """Text up to ``end`` is content."""
        if end > self._told:
            self._deltas.append(Delta(content=self._text[self._told : end]))
            self._told = end

    def _tell_arguments(self) -> None:
        if self._in_arguments and self._place > self._told:
            self._deltas.append(Delta(index=self._num_calls - 1, arguments=self._text[self._told : self._place]))
            self._told = self._place

    def _end_arguments(self) -> None:
        self._tell_arguments()
        self._in_arguments = False

    def _value(self, depth: int) -> Reading:
        first = yield from self._peek()
        if first == "{":
            yield from self._object(depth)
        elif first == "[":
            yield from self._list(self._value, depth)
        elif first == '"':
            yield from self._string()
        else:
            yield from self._literal()

    def _object(self, depth: int) -> Reading:
        yield from self._expect("{")
        yield from self._skip_space()
        if (yield from self._peek()) != "}":
            yield from self._key()
            yield from self._deeper(self._value, depth)
            while (yield from self._more()):
                yield from self._key()
                yield from self._deeper(self._value, depth)
        yield from self._expect("}")

    def _list(self, item: Callable[[int], Reading], depth: int) -> Reading:
        yield from self._expect("[")
        yield from self._skip_space()
        if (yield from self._peek()) != "]":
            yield from self._deeper(item, depth)
            while (yield from self._more()):
                yield from self._deeper(item, depth)
        yield from self._expect("]")

    def _deeper(self, item: Callable[[int], Reading], depth: int) -> Reading:
        if depth >= MAX_NESTED:
            raise _Malformed
        yield from item(depth + 1)

    def _key(self) -> Reading:
        """What stands in front of a value in an object."""
        key = json.loads((yield from self._string()))
        yield from self._skip_space()
        yield from self._expect(":")
        yield from self._skip_space()
        return key

    def _more(self) -> Reading:
        """Whether a comma follows, and past it."""
        yield from self._skip_space()
        if (yield from self._peek()) != ",":
            return False
        self._place += 1
        yield from self._skip_space()
        return True

    def _string(self) -> Reading:
        begin = self._place
        yield from self._expect('"')
        while (yield from self._peek()) != '"':
            if self._text[self._place] < " ":
                raise _Malformed
            if self._text[self._place] == "\\":
                yield from self._escape()
            self._place += 1
        self._place += 1
        return self._text[begin : self._place]

    def _escape(self) -> Reading:
        """Up to the last character of an escape."""
        self._place += 1
        if (yield from self._peek()) not in '"\\/bfnrtu':
            raise _Malformed
        for _ in range(4 if self._text[self._place] == "u" else 0):
            self._place += 1
            if (yield from self._peek()) not in "0123456789abcdefABCDEF":
                raise _Malformed

    def _literal(self) -> Reading:
        begin = self._place
        while (yield from self._peek()) in "+-.0123456789abcdefghijklmnopqrstuvwxyzE":
            self._place += 1
        if not _LITERAL.fullmatch(self._text, begin, self._place):
            raise _Malformed

    def _skip_space(self) -> Reading:
        while (yield from self._peek()) in _SPACE:
            self._place += 1

    def _expect(self, what: str) -> Reading:
        for character in what:
            if (yield from self._peek()) != character:
                raise _Malformed
            self._place += 1

    def _peek(self) -> Reading:
        """The next character, when it is there."""
        while self._place == len(self._text):
            if self._ended:
                raise _Ended
            yield
        return self._text[self._place]
