"""Word problems of two or three steps of arithmetic, with worked answers: JSON lines on stdout.

    python problems.py --count 80000 --seed 0 > train.jsonl
    python problems.py --count 500 --seed 1 > ../../../../bench/data/arithmetic.jsonl
    python problems.py --sums > sums.jsonl      # every step by itself, without a story

Every number is from 1 to 99. The same step is worded in many ways, as people do: a model of such text is sure of few
words before it has read the ones in front of them. Problems of an odd seed and of an even seed are never the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from typing import NamedTuple

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kara Liam Mia Noah Olga Paul Rosa Sam Tina Uma Vera Will Yara Zoe"
).split()
THINGS = (
    "apples books coins cards shells stamps pens stones cups plums pears eggs nuts keys rings beads balls kites maps "
    "candles buttons cakes roses toys"
).split()
MOST = 99


class Event(NamedTuple):
    """What happens to a count: the sentence of it, its steps as (left, sign, right, result), and the count after it."""

    told: str
    steps: list[tuple[int, str, int, int]]
    left: int


STARTS = (
    "{name} has {a} {things}.",
    "{name} starts with {a} {things}.",
    "There are {a} {things} in the box of {name}.",
    "At first {name} owns {a} {things}.",
)
GAINS = (
    "{other} gives {name} {b} more.",
    "{name} buys {b} more {things}.",
    "Then {name} finds {b} {things}.",
    "{name} gets {b} {things} from {other}.",
)
LOSSES = (
    "{name} gives {b} of them to {other}.",
    "{name} loses {b} {things}.",
    "Then {name} sells {b} {things}.",
    "{other} takes {b} of the {things}.",
)
PACKS = (
    "{name} buys {p} bags of {q} {things} each.",
    "{other} brings {p} boxes with {q} {things} in each.",
    "Then {name} gets {p} packs of {q} {things}.",
)
TIMES = (
    "Then the number of {things} grows to {b} times as many.",
    "A year later {name} has {b} times as many.",
    "{other} makes it {b} times as many {things}.",
)
SHARES = (
    "{name} shares them equally among {b} bowls and keeps one bowl.",
    "Then {name} splits the {things} into {b} equal heaps and takes one heap.",
    "{b} friends, {name} among them, share the {things} equally.",
)
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there in the end?",
    "What is the number of {things} that {name} has?",
    "How many {things} does this leave {name}?",
)

# how the first step begins, how others do, and what is said of a step; "p": what comes in packs
FIRST = ("", "", "First, ", "Here ")
LATER = ("", "Then ", "Next ", "So ", "Now ", "Here ")
WORDINGS = {
    "+": (
        "{name} has {sum} {things}",
        "adding gives {sum}",
        "that makes {sum} {things}",
        "the total grows to {sum}",
        "there are {sum} {things}",
        "we add and get {sum}",
    ),
    "-": (
        "{name} keeps {sum} {things}",
        "taking away leaves {sum}",
        "that leaves {sum} {things}",
        "the total falls to {sum}",
        "there are {sum} {things} left",
        "we subtract and get {sum}",
    ),
    "*": (
        "{name} has {sum} {things}",
        "multiplying gives {sum}",
        "that makes {sum} {things}",
        "the total grows to {sum}",
        "there are {sum} {things}",
        "we multiply and get {sum}",
    ),
    "/": (
        "{name} has {sum} {things}",
        "dividing gives {sum}",
        "one part is {sum} {things}",
        "each part holds {sum}",
        "that leaves {sum} {things}",
        "we divide and get {sum}",
    ),
    "p": (
        "{sum} {things} are new",
        "the new {things} are {sum}",
        "all bags hold {sum}",
        "that makes {sum} more {things}",
        "{sum} are to be added",
        "together they hold {sum}",
    ),
}


def event(chance: random.Random, count: int, room: int) -> Event | None:
    """Something that can happen to ``count`` things, in ``room`` steps at most; None where it does not fit."""
    kind = chance.choice("++--*/p")
    if kind == "+":
        b = chance.randint(2, 12)
        return Event(chance.choice(GAINS).replace("{b}", str(b)), [(count, "+", b, count + b)], count + b)
    if kind == "-":
        b = chance.randint(2, 12)
        return Event(chance.choice(LOSSES).replace("{b}", str(b)), [(count, "-", b, count - b)], count - b)
    if kind == "*":
        b = chance.randint(2, 3)
        return Event(chance.choice(TIMES).replace("{b}", str(b)), [(count, "*", b, count * b)], count * b)
    if kind == "/":
        b = chance.randint(2, 5)
        if count % b:
            return None
        return Event(chance.choice(SHARES).replace("{b}", str(b)), [(count, "/", b, count // b)], count // b)
    if room < 2:
        return None
    p, q = chance.randint(2, 4), chance.randint(2, 6)
    told = chance.choice(PACKS).replace("{p}", str(p)).replace("{q}", str(q))
    return Event(told, [(p, "p", q, p * q), (count, "+", p * q, count + p * q)], count + p * q)


def problem(chance: random.Random) -> dict[str, str]:
    """One problem: question, and an answer that shows its steps and ends in "#### " and the number."""
    name, other = chance.sample(NAMES, 2)
    names = {"name": name, "other": other, "things": chance.choice(THINGS)}
    wanted = chance.randint(2, 3)
    while True:
        first = chance.randint(5, 60)
        told = [chance.choice(STARTS).replace("{a}", str(first))]
        steps: list[tuple[int, str, int, int]] = []
        count = first
        while len(steps) < wanted:
            happened = event(chance, count, wanted - len(steps))
            if happened is None or not all(1 <= step[3] <= MOST for step in happened.steps):
                break
            told.append(happened.told)
            steps += happened.steps
            count = happened.left
        else:
            break
    told.append(chance.choice(QUESTIONS))
    worked: list[str] = []
    for left, sign, right, result in steps:
        said = chance.choice(WORDINGS[sign])
        opening = chance.choice(LATER if worked else FIRST)
        said = opening + said if opening else said[0].upper() + said[1:]
        worked.append(said.replace("{sum}", f"{left} {'*' if sign == 'p' else sign} {right} = {result}"))
    answer = ". ".join(worked) + f". #### {count}"
    return {"question": " ".join(told).format(**names), "answer": answer.format(**names)}


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different ones, on the side of the seed's parity: a question's digest decides on which side it is."""
    chance = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        one = problem(chance)
        side = hashlib.sha256(one["question"].encode()).digest()[0] % 2
        if side == seed % 2:
            found.setdefault(one["question"], one)
    return list(found.values())


def sums() -> list[dict[str, str]]:
    """Every step that a problem can ask for, once: "Work out 12 + 5." and "12 + 5 = 17. #### 17"."""
    packs = {p * q for p in range(2, 5) for q in range(2, 7)}
    found = {}
    for left in range(1, MOST + 1):
        for right in range(2, MOST):
            steps = [("+", left + right, right <= 12 or right in packs), ("-", left - right, right <= 12)]
            steps += [("*", left * right, right <= 3 or (left <= 4 and right <= 6))]
            steps += [("/", left // right, right <= 5 and left % right == 0)]
            for sign, result, asked_for in steps:
                if asked_for and 1 <= result <= MOST:
                    asked = f"{left} {sign} {right}"
                    found[asked] = {"question": f"Work out {asked}.", "answer": f"{asked} = {result}. #### {result}"}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--count", type=int, help="how many problems")
    what.add_argument("--sums", action="store_true", help="every sum once, instead of problems")
    parser.add_argument("--seed", type=int, default=0, help="of chance; odd and even seeds share no problem")
    given = parser.parse_args()
    for one in sums() if given.sums else problems(given.count, given.seed):
        sys.stdout.write(json.dumps(one) + "\n")


if __name__ == "__main__":
    main()
