"""Prompts from JSON lines in the shapes that people have them, their token ids, and which of them are held out.

Knows texts and tokenizers. Does not know models or lessons.

A line is one of {"prompt"}, {"question"}, {"instruction", "input"}, {"turns": […]} (the first is asked),
{"messages": [{"role", "content"}, …]} or {"text"}, which is continued as it is, without a chat template. An answer may
stand beside it as "answer", "output", "completion" or "response"; of messages it is the last one, if an assistant's.

A file may also be a request log (``accel.request_log``), whose prompts and answers are token ids already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel import request_log
from accel.distill.files import read_text
from accel.errors import OptionError
from accel.request_log import Logged

SHAPES = ("prompt", "question", "instruction", "turns", "messages", "text")
ANSWERS = ("answer", "output", "completion", "response")
_MOST_NAMED = 5


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation's ``messages`` (role, content), a ``text`` that is continued as it is, or the
    token ids of a ``logged`` row, which has its answer with it."""

    messages: tuple[tuple[str, str], ...] = ()
    text: str = ""
    answer: str | None = None
    logged: Logged | None = None

    def digest(self) -> str:
        """sha256 of what is asked; the answer plays no part."""
        if self.logged is not None:
            return hashlib.sha256(json.dumps(self.logged.prompt).encode()).hexdigest()
        return hashlib.sha256(json.dumps([self.messages, self.text]).encode()).hexdigest()


def read(files: Iterable[str | Path]) -> list[Prompt]:
    """The prompts of JSON-lines files, in order. Bad lines are named, by file and number, in one error.

    Of a request log the older file is read first, where there is one.
    """
    paths = [Path(file) for file in files]
    prompts: list[Prompt] = []
    wrong: list[str] = []
    for path in paths:
        if request_log.is_log(path):
            try:
                prompts += _logged(path, paths)
            except ValueError as error:
                wrong.append(str(error))
            continue
        for where, line in _lines(path):
            try:
                prompts.append(parse(line))
            except ValueError as error:
                wrong.append(f"{where}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise OptionError("; ".join(wrong[:_MOST_NAMED]) + more)
    if not prompts:
        raise OptionError("no prompts in " + ", ".join(map(str, paths)) + ": one JSON object a line")
    return prompts


def _logged(path: Path, given: Sequence[Path]) -> Iterator[Prompt]:
    """The rows of a request log, behind those of its older file unless that is ``given`` by name."""
    real = path.resolve()
    before = request_log.older(real)
    both = [before, path] if before.exists() and before not in {each.resolve() for each in given} else [path]
    for file in both:
        try:
            yield from (Prompt(logged=row) for row in request_log.read(file))
        except OSError as error:
            raise OptionError(f"cannot read prompts from {file}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # not splitlines(): a JSON string may hold U+2028 and its like as they are
    for number, line in enumerate(read_text(path, "prompts from").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def parse(line: str) -> Prompt:
    """One line; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    shape = next((name for name in SHAPES if name in row), None)
    if shape is None:
        raise ValueError(f"needs one of {', '.join(SHAPES)}, has {', '.join(map(repr, row)) or 'nothing'}")
    answer = next((_text(row, name) for name in ANSWERS if row.get(name) is not None), None)
    if shape == "messages":
        return _conversation(row["messages"], answer)
    if shape == "turns":
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
            raise ValueError("turns must be a list that begins with a text")
        # later turns refer to replies that nobody has written
        return Prompt((("user", turns[0]),), answer=answer)
    asked = _text(row, shape)
    if shape == "text":
        return Prompt(text=asked, answer=answer)
    if shape == "instruction" and row.get("input"):
        asked = f"{asked}\n{_text(row, 'input')}"
    return Prompt((("user", asked),), answer=answer)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty")
    return value


def _conversation(raw: Any, answer: str | None) -> Prompt:
    if not isinstance(raw, list) or not all(isinstance(each, dict) for each in raw):
        raise ValueError('messages must be a list of {"role", "content"}')
    messages = [(each.get("role"), each.get("content")) for each in raw]
    if not all(isinstance(role, str) and isinstance(content, str) and role for role, content in messages):
        raise ValueError("every message needs a role and a content, both texts")
    if messages and messages[-1][0] == "assistant":
        answer = messages.pop()[1]
    if not messages:
        raise ValueError("messages hold nothing that is asked")
    return Prompt(tuple(messages), answer=answer or None)


@dataclass
class Encoded:
    """Prompts as token ids; a prompt's place here is its index everywhere else."""

    prompts: list[list[int]] = field(default_factory=list)
    # of each prompt, or None where the file has none
    answers: list[list[int] | None] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    # left out, because they have more tokens than allowed
    num_too_long: int = 0

    def digest(self) -> str:
        """sha256 of all ids, prompts and answers."""
        return hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()

    def take(self, places: Sequence[int]) -> Encoded:
        """Some of the prompts, under new indices."""
        return Encoded(
            [self.prompts[place] for place in places],
            [self.answers[place] for place in places],
            [self.digests[place] for place in places],
        )


def encode(prompts: Sequence[Prompt], tokenizer: Any, *, longest: int, end: int | None = None) -> Encoded:
    """Token ids, by the tokenizer's chat template where it has one; prompts over ``longest`` tokens are counted.

    ``end``: the token that ends an answer of the file. Logged rows stay as they are.
    """
    encoded = Encoded()
    for prompt in prompts:
        ids = _encode(prompt, tokenizer)
        if len(ids) > longest:
            encoded.num_too_long += 1
            continue
        answer = None
        if prompt.logged is not None:
            answer = list(prompt.logged.new)
        elif prompt.answer is not None:
            answer = [*tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
        encoded.prompts.append(ids)
        encoded.answers.append(answer)
        encoded.digests.append(prompt.digest())
    if not encoded.prompts:
        raise OptionError(f"all {encoded.num_too_long} prompts are longer than {longest} tokens: allow longer ones")
    return encoded


def _encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    if prompt.logged is not None:
        return list(prompt.logged.prompt)
    if prompt.messages and getattr(tokenizer, "chat_template", None):
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(prompt.text or "\n\n".join(content for _, content in prompt.messages))
    ids: list[int] = list(found["input_ids"])
    if not ids:
        raise OptionError(f"the prompt {(prompt.text or prompt.messages[-1][1])!r:.60} has no tokens")
    return ids


def split(digests: Sequence[str], share: float, most: int) -> tuple[list[int], list[int]]:
    """Places of the prompts to learn from and of those held out: about ``share`` of them, ``most`` at most.

    A prompt's own digest decides, so that it stays on its side when others come or go, and its copies with it.
    At least one prompt is held out.
    """
    if len(set(digests)) < 2:
        raise OptionError("one prompt cannot be both learned from and held out: give 2 different ones or more")
    limit = max(share * 2**32, 1)
    order = sorted({digest for digest in digests if int(digest[:8], 16) < limit} or {min(digests)})
    held = set(order[:most] if len(order) < len(set(digests)) else order[:1])
    kept = [place for place, digest in enumerate(digests) if digest not in held]
    first = {digest: place for place, digest in reversed(list(enumerate(digests)))}
    return kept, sorted(first[digest] for digest in held)
