"""Retrieval tasks of an exact length in tokens: a number said once in a long text, and asked for behind it.

`passkey`: the same five sentences over and over, as in the literature (Mohtashami and Jaggi, arXiv 2305.16300).
`needle`: varied text, sentences of the embedded documents in any order (S-NIAH, arXiv 2404.06654).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import OptionError

DATA = Path(__file__).parent / "data"
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
PASSKEY = "The pass key is {number}. Remember it. {number} is the pass key."
PASSKEY_QUESTION = "What is the pass key? The pass key is"
NEEDLE = "The special number of {city} is {number}."
NEEDLE_QUESTION = "What is the special number of {city}? The special number of {city} is"
CITIES = (
    *("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Lisbon", "Oslo", "Athens", "Dublin", "Prague"),
    *("Cairo", "Tokyo", "Sydney", "Moscow", "Boston", "Chicago", "Toronto", "Mumbai", "Geneva", "Warsaw", "Lima"),
)
DIGITS = 5


@dataclass(frozen=True)
class Task:
    """``ids``: the prompt, exactly as many tokens as were asked for; ``question``: the same as text.

    ``answer``: the digits that should follow. ``depth``: how much of the text stands before them, 0 to 1.
    """

    ids: tuple[int, ...]
    question: str
    answer: str
    depth: float

    def right(self, said: str) -> bool:
        """Whether the first number of a reply is the answer; spaces between digits are the tokenizer's."""
        return right(said, self.answer)


def right(said: str, answer: str) -> bool:
    """Whether the first number in ``said`` is ``answer``, digit for digit."""
    found = re.search(r"\d(?: ?\d)*", said)
    return found is not None and found.group().replace(" ", "") == answer


def passkey(
    chance: random.Random, tokens: int, tokenizer: Any, *, digits: int = DIGITS, depth: float | None = None
) -> Task:
    """A pass key in the five sentences. ``depth`` 0 is the beginning of the text; None: anywhere, by ``chance``."""
    number = _number(chance, digits)
    start = chance.randrange(len(FILLER))
    filler = (FILLER[(start + n) % len(FILLER)] for n in range(tokens))
    return _hidden(chance, tokens, tokenizer, filler, PASSKEY.format(number=number), PASSKEY_QUESTION, number, depth)


def needle(
    chance: random.Random, tokens: int, tokenizer: Any, *, digits: int = DIGITS, depth: float | None = None
) -> Task:
    """The special number of a city among sentences of other things, which come again when all have been said."""
    number, city = _number(chance, digits), chance.choice(CITIES)
    said, asked = NEEDLE.format(city=city, number=number), NEEDLE_QUESTION.format(city=city)
    return _hidden(chance, tokens, tokenizer, _varied(chance), said, asked, number, depth)


def filled(chance: random.Random, tokens: int, tokenizer: Any) -> tuple[int, ...]:
    """Varied text that hides nothing, as token ids."""
    return tuple(each for piece in _pieces(tokenizer, _varied(chance), tokens) for each in piece)


TASKS: dict[str, Callable[..., Task]] = {"passkey": passkey, "needle": needle}


def sentences(text: str) -> list[str]:
    """The sentences of a text, without its headings."""
    lines = (line for line in text.splitlines() if line.rstrip().endswith((".", "!", "?")))
    return [each for line in lines for each in re.split(r"(?<=[.!?])\s+", line.strip())]


def _varied(chance: random.Random) -> Iterator[str]:
    texts = [(DATA / name).read_text(encoding="utf-8") for name in ("handbook.txt", "railway.txt")]
    every = [each for text in texts for each in sentences(text)]
    while True:
        yield from chance.sample(every, len(every))


def _number(chance: random.Random, digits: int) -> str:
    if digits < 1:
        raise OptionError(f"digits={digits}: a number needs at least one")
    # no zero in front: it would be no number
    return str(chance.randrange(10 ** (digits - 1), 10**digits))


def _hidden(
    chance: random.Random,
    tokens: int,
    tokenizer: Any,
    filler: Iterator[str],
    said: str,
    asked: str,
    answer: str,
    depth: float | None,
) -> Task:
    """The sentence ``said`` between two of the filler; the beginning is cut to make the length exact."""
    depth = chance.random() if depth is None else depth
    begin, inner, end = _opening(tokenizer), _behind(tokenizer, said), _behind(tokenizer, asked)
    room = tokens - len(begin) - len(inner) - len(end)
    if room < 0:
        raise OptionError(f"tokens={tokens}: the task itself has {tokens - room}; ask for a longer prompt")
    pieces = _pieces(tokenizer, filler, room)
    place = round(depth * len(pieces))
    pieces.insert(place, inner)
    ids = (*begin, *(each for piece in pieces for each in piece), *end)
    before = sum(map(len, pieces[:place]))
    assert len(ids) == tokens
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Task(ids, text, answer, before / room if room else 0.0)


def _pieces(tokenizer: Any, filler: Iterator[str], room: int) -> list[Sequence[int]]:
    """Sentences as token ids, ``room`` of them together."""
    pieces: list[Sequence[int]] = []
    length = 0
    known: dict[str, Sequence[int]] = {}
    while length < room:
        sentence = next(filler)
        if sentence not in known:
            known[sentence] = _behind(tokenizer, sentence)
        pieces.append(known[sentence])
        length += len(known[sentence])
    while length > room:
        cut = min(length - room, len(pieces[0]))
        pieces[:1] = [pieces[0][cut:]] if cut < len(pieces[0]) else []
        length -= cut
    return pieces


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text; what it may put behind one does not belong in a prompt."""
    added = list(tokenizer("")["input_ids"])
    return added[:1] if added and added[0] == getattr(tokenizer, "bos_token_id", None) else []


def _behind(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands behind a full stop and a space, whichever way the tokenizer marks spaces."""
    stop = list(tokenizer(".", add_special_tokens=False)["input_ids"])
    both = list(tokenizer(f". {text}", add_special_tokens=False)["input_ids"])
    if both[: len(stop)] == stop:
        return both[len(stop) :]
    return list(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
