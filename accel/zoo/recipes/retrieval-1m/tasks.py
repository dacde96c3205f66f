"""Texts in which numbers stand that are asked for behind them: JSON lines on stdout, all of one length in tokens.

    python tasks.py --tokenizer-output tokenizer        # first the tokenizer of such texts
    python tasks.py --tokenizer tokenizer --count 40000 --length 128 > lessons.jsonl

Pass keys and needles are the benchmark's (accel/bench/passkey.py), from seeds of their own, and never with a number
that is `held_out`: those are left to measure with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from accel.bench import passkey

# shares of the lessons; "several": more numbers in a text, asked for in any order
KINDS = {"passkey": 0.4, "needle": 0.3, "several": 0.3}
# the teacher's: lists of cities with numbers, said twice, teach it to look back within minutes
EASY = {"passkey": 0.2, "needle": 0.15, "several": 0.25, "list": 0.4}
MOST = 3
DOCUMENTS = ("handbook.txt", "railway.txt")
# of a text for the tokenizer
_SAMPLE = 400


def held_out(number: str) -> bool:
    """One number in ten, by its digest: no lesson has it."""
    return hashlib.sha256(number.encode()).digest()[0] % 10 == 0


def number(chance: random.Random) -> str:
    """One to learn from."""
    while held_out(found := str(chance.randrange(10 ** (passkey.DIGITS - 1), 10**passkey.DIGITS))):
        pass
    return found


def lesson(chance: random.Random, length: int, tokenizer: Any, kinds: Mapping[str, float]) -> dict[str, str]:
    """One text and its answer, together ``length`` tokens with the token that ends it; a list may be shorter."""
    while True:
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        if kind == "list":
            return listed(chance, length)
        found = several(chance, length, tokenizer) if kind == "several" else single(chance, length, tokenizer, kind)
        # the first sentence is cut by tokens, and its rest need not be the same tokens when it is read again
        if found is not None and sum(len(tokenizer(part)["input_ids"]) for part in found.values()) + 1 == length:
            return found


def single(chance: random.Random, length: int, tokenizer: Any, kind: str) -> dict[str, str] | None:
    # tokenizers differ in the space before a number; with the end
    behind = len(tokenizer(f" {'1' * passkey.DIGITS}.")["input_ids"]) + 1
    task = passkey.TASKS[kind](chance, length - behind, tokenizer)
    return None if held_out(task.answer) else {"text": task.question, "answer": f" {task.answer}."}


def listed(chance: random.Random, length: int) -> dict[str, str]:
    """Cities with numbers, and again in another order."""
    # a line has seven tokens
    most = min(length // 14, len(passkey.CITIES))
    lines = [f" {city} {number(chance)}." for city in chance.sample(passkey.CITIES, chance.randint(1, most))]
    return {"text": "".join(lines), "answer": "".join(chance.sample(lines, len(lines)))}


def several(chance: random.Random, length: int, tokenizer: Any) -> dict[str, str] | None:
    """Two or three numbers, a pass key among them or not, between sentences of either kind."""
    facts = [
        (passkey.NEEDLE.format(city=city, number=said), passkey.NEEDLE_QUESTION.format(city=city), said)
        for city, said in ((city, number(chance)) for city in chance.sample(passkey.CITIES, MOST))
    ]
    key = number(chance)
    facts[0] = chance.choice([facts[0], (passkey.PASSKEY.format(number=key), passkey.PASSKEY_QUESTION, key)])
    facts = facts[: chance.randint(2, MOST)]
    asked = chance.sample(facts, len(facts))
    answer = " ".join(f"{question} {said}." for _, question, said in asked)
    # the first question is the text's
    first = len(asked[0][1])
    texts = [f" {said}" for said, _, _ in facts]
    room = length - 1 - sum(len(tokenizer(part)["input_ids"]) for part in (*texts, f" {answer}"))
    if room < 0:
        return None
    begin: list[int] = []
    filler = fillers(chance)
    pieces: list[str] = []
    while len(begin) < room:
        pieces.append(f" {next(filler)}")
        begin += tokenizer(pieces[-1])["input_ids"]
    if pieces:
        ids = tokenizer(pieces[0])["input_ids"]
        # too much where the last piece is longer than the first one: then another one is made
        pieces[0] = tokenizer.decode(ids[len(begin) - room :])
    for fact in texts:
        pieces.insert(chance.randint(0, len(pieces)), fact)
    return {"text": "".join(pieces) + f" {answer[:first]}", "answer": answer[first:]}


def fillers(chance: random.Random) -> Iterator[str]:
    """The five sentences over and over, or those of the documents."""
    if chance.random() < 0.5:
        start = chance.randrange(len(passkey.FILLER))
        for place in range(start, 10**9):
            yield passkey.FILLER[place % len(passkey.FILLER)]
    yield from varied(chance)


def varied(chance: random.Random) -> Iterator[str]:
    """The sentences of the benchmark's documents, in any order, without end."""
    every = [
        each for name in DOCUMENTS for each in passkey.sentences((passkey.DATA / name).read_text(encoding="utf-8"))
    ]
    while True:
        yield from chance.sample(every, len(every))


def sample(chance: random.Random) -> list[str]:
    """Text that holds every word of the tasks."""
    told = varied(chance)
    texts = [f" {next(told)}" for _ in range(_SAMPLE)]
    for city in passkey.CITIES * 4:
        said = number(chance)
        texts += [f" {passkey.NEEDLE.format(city=city, number=said)}", f" {passkey.NEEDLE_QUESTION.format(city=city)}"]
        texts += [f" {passkey.PASSKEY.format(number=said)}", f" {passkey.PASSKEY_QUESTION}"]
        texts += [f" {each}" for each in passkey.FILLER]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokenizer-output", type=Path, help="make the tokenizer, in this folder")
    what.add_argument("--tokenizer", type=Path, help="of the model that is to learn")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--length", type=int, default=128, help="tokens of each text with its answer")
    parser.add_argument("--shortest", type=int, help="from as many tokens on, instead of all equally long")
    parser.add_argument("--easy", action="store_true", help="lists among them, as the teacher needs them")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    if given.tokenizer_output is not None:
        shared = runpy.run_path(str(Path(__file__).parent.parent / "causal.py"))
        shared["make_tokenizer"](sample(chance), given.vocabulary, chat=False).save_pretrained(given.tokenizer_output)
        return
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    for _ in range(given.count):
        length = given.length if given.shortest is None else chance.randint(given.shortest, given.length)
        print(json.dumps(lesson(chance, length, tokenizer, EASY if given.easy else KINDS)))


if __name__ == "__main__":
    main()
