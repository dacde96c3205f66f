"""Questions of a help desk with one right answer each, that nobody can know who was not shown how the house does it.

`labels`: a customer's message → the code of the team that handles it; the codes say nothing about the teams.
`extraction`: an order → a JSON object of four keys, with the house's codes for units and its way to write days.

Made from words that go together, in any number; no two seeds share a text. Knows no models.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accel.bench.dealing import check_draw, dealt
from accel.errors import OptionError, unknown_name
from accel.methods.cascade.agreement import json_value, normalised

SYSTEM_LABELS = "Which team handles this message? Answer with the code of the team alone."
SYSTEM_EXTRACTION = "Write the order as JSON with the keys item, amount, unit and day. Answer with the JSON alone."

KINDS = ("labels", "extraction")
MOST_QUESTIONS = 2000


@dataclass(frozen=True)
class Team:
    """What customers write to a team about: any of the subjects with any of the complaints."""

    code: str
    subjects: tuple[str, ...]
    complaints: tuple[str, ...]


TEAMS = (
    Team(
        "T-ORCHID",
        ("my invoice", "the last bill", "the bill for May", "our monthly statement", "the receipt", "invoice 88"),
        (
            *("lists the same charge twice", "shows a fee I never agreed to", "adds up to the wrong total"),
            *("charges me for last year again", "has the wrong tax on it", "is higher than the price I saw"),
        ),
    ),
    Team(
        "T-BASALT",
        ("my parcel", "our delivery", "the package", "my order", "the shipment", "the box I ordered"),
        (
            *("has not arrived", "is a week late", "went to the wrong street", "is stuck at the depot"),
            *("was left with nobody", "shows no tracking at all"),
        ),
    ),
    Team(
        "T-HERON",
        ("my password", "the login page", "my account", "the sign-in code", "my user name", "the reset link"),
        (
            *("is not accepted", "says I am unknown", "locks me out", "keeps asking me to sign in again"),
            *("was refused five times", "does not let me log in"),
        ),
    ),
    Team(
        "T-COBALT",
        ("the refund", "my money back", "the repayment", "the credit for the shoes", "my deposit", "the refunded sum"),
        (
            *("has not reached my bank", "is less than I paid", "was promised two weeks ago", "went to an old card"),
            *("is still pending", "was only half of the price"),
        ),
    ),
    Team(
        "T-WILLOW",
        ("the lamp", "my new chair", "the coffee pot", "the mirror", "the shelf I bought", "the glass table"),
        (
            *("came broken", "has a deep scratch", "was cracked in its box", "is missing a leg or a screw"),
            *("is bent out of shape", "fell apart when I unpacked it"),
        ),
    ),
    Team(
        "T-QUARTZ",
        ("my contract", "our subscription", "the membership", "my yearly plan", "the trial", "our newspaper plan"),
        (
            *("should end this month", "must not be renewed", "is to be cancelled please", "is no longer wanted"),
            *("has to be terminated", "should stop before the next period"),
        ),
    ),
    Team(
        "T-FALCON",
        (
            "the app",
            "your phone app",
            "the tablet version",
            "the new update",
            "the mobile program",
            "the app on my phone",
        ),
        (
            *("crashes when it starts", "freezes on the first screen", "shows a blank screen", "closes by itself"),
            *("will not install", "stops with error 12"),
        ),
    ),
    Team(
        "T-MAPLE",
        ("the internet", "our line", "the wifi", "the connection", "the broadband", "the signal at home"),
        (
            *("is very slow", "drops every hour", "is down in our street", "does not come back", "is dead"),
            *("is weaker than it was",),
        ),
    ),
    Team(
        "T-ONYX",
        (
            "my address",
            "our street name",
            "my surname",
            "the phone number you have",
            "my email address",
            "our postcode",
        ),
        (
            *("has changed", "is spelled wrong in your records", "needs to be updated", "is an old one"),
            *("is not the right one any more", "will soon be another one"),
        ),
    ),
    Team(
        "T-CEDAR",
        ("my personal data", "the photo of me", "my profile", "the data about my son", "my history", "what you store"),
        (
            *("must be deleted", "should not be shared with others", "was sold without my consent"),
            *("should be sent to me as a copy", "is public and should be private", "was kept against my wishes"),
        ),
    ),
    Team(
        "T-RAVEN",
        (
            "the blue model",
            "the larger size",
            "the spare battery",
            "the travel set",
            "the winter coat",
            "the old edition",
        ),
        (
            *("is sold out, when is it back", "is not in the shop, will you get more", "fits which of your cases"),
            *("weighs how much", "comes in which colours", "costs how much for ten"),
        ),
    ),
    Team(
        "T-TOPAZ",
        (
            "the technician",
            "our appointment",
            "the repair visit",
            "the man for the boiler",
            "the fitter",
            "my time slot",
        ),
        (
            *("did not show up", "has to move to another day", "came when nobody was home", "is too early for us"),
            *("was never confirmed", "should come in the evening instead"),
        ),
    ),
)
CODES = tuple(team.code for team in TEAMS)

OPENINGS = ("", "hello, ", "please help, ", "sorry, ", "once more: ", "good day, ", "urgent: ", "a question: ")
NAMES = (
    *("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gwen", "Hugo", "Ines", "Jon", "Kira", "Liam", "Mona", "Nils"),
    *("Olga", "Paul", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Walt", "Xenia", "Yann", "Zoe", "Anton", "Bella", "Carl"),
    *("Dina", "Ewan"),
)
CITIES = (
    *("Oslo", "Rome", "Paris", "Berlin", "Madrid", "Vienna", "Lisbon", "Athens", "Dublin", "Prague", "Cairo", "Tokyo"),
    *("Boston", "Lima", "Geneva", "Warsaw", "Riga", "Bern", "Turin", "Malmo"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("morning", "noon", "evening")

COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "yellow")
GOODS = (
    *("pens", "cups", "towels", "candles", "ropes", "tiles", "hats", "gloves", "folders", "buttons", "bricks", "socks"),
    *("ribbons", "beads", "cables", "plates"),
)
# said → the house's code
UNITS = {"boxes": "BX", "crates": "CR", "bags": "BG", "pallets": "PL", "rolls": "RL", "bundles": "BN"}
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
AMOUNTS, MONTH_DAYS = range(2, 41), range(1, 29)
ORDERS = (
    "Please send {amount} {unit} of {item} by {day}.",
    "We need {amount} {unit} of {item} on {day}.",
    "By {day} we want {amount} {unit} of {item}.",
    "Order: {item}, {amount} {unit}, for {day}.",
    "Can you deliver {amount} {unit} of {item} by {day}?",
    "{amount} {unit} of {item}, please, for {day}.",
    "For {day}: {amount} {unit} of {item}.",
    "We are out of {item}: bring {amount} {unit} on {day}.",
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(kind: str, count: int, seed: int) -> list[Question]:
    """``count`` different questions; labels of all teams alike. No two seeds share a text."""
    _check_kind(kind)
    check_draw(count, seed, MOST_QUESTIONS)
    chance = random.Random(f"desk {kind} {seed}")
    drawn = _labels(chance, seed) if kind == "labels" else _orders(chance, seed)
    return [Question(kind, text, answer) for text, answer in itertools.islice(drawn, count)]


def right(question: Question, said: str) -> bool:
    """Whether an answer is right: as texts without case and punctuation around them, or as JSON."""
    key = normalised if question.kind == "labels" else json_value
    return key(said) == key(question.answer)


def wrong(question: Question, rng: random.Random) -> str:
    """What somebody might answer who is not careful: another team, or an order with one field mistaken."""
    if question.kind == "labels":
        return rng.choice([code for code in CODES if code != question.answer])
    order = json.loads(question.answer)
    return json.dumps(order | rng.choice(list(_mistakes(order, rng))))


def _mistakes(order: dict[str, Any], rng: random.Random) -> Iterator[dict[str, Any]]:
    """For each field another value."""
    yield {"item": order["item"].split()[-1]}
    yield {"amount": order["amount"] + rng.choice((-1, 1, 10))}
    yield {"unit": rng.choice([code for code in UNITS.values() if code != order["unit"]])}
    month, day = order["day"].split("-")
    yield {"day": f"{day}-{month}" if day != month else f"{month}-{int(day) % len(MONTH_DAYS) + 1:02}"}


def _labels(chance: random.Random, seed: int) -> Iterator[tuple[str, str]]:
    drawn = {team.code: _different(chance, OPENINGS, team.subjects, team.complaints) for team in TEAMS}
    while True:
        for team in chance.sample(TEAMS, len(TEAMS)):
            opening, subject, complaint = next(drawn[team.code])
            said = f"{opening}{subject} {complaint}"
            name, city, day, hour = dealt(seed, said, [len(NAMES), len(CITIES), len(DAYS), len(HOURS)])
            yield f"{NAMES[name]} from {CITIES[city]}, {DAYS[day]} {HOURS[hour]}: {said}.", team.code


def _orders(chance: random.Random, seed: int) -> Iterator[tuple[str, str]]:
    for words in _different(chance, ORDERS, COLOURS, GOODS, tuple(UNITS)):
        amount, day, month = dealt(seed, " ".join(words), [len(AMOUNTS), len(MONTH_DAYS), len(MONTHS)])
        order, colour, goods, unit = words
        item, when = f"{colour} {goods}", f"{MONTH_DAYS[day]} {MONTHS[month]}"
        text = order.format(amount=AMOUNTS[amount], unit=unit, item=item, day=when)
        wanted = {
            "item": item,
            "amount": AMOUNTS[amount],
            "unit": UNITS[unit],
            "day": f"{month + 1:02}-{MONTH_DAYS[day]:02}",
        }
        yield text, json.dumps(wanted)


def _different(chance: random.Random, *choices: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """One of each, again and again; never the same ones twice."""
    known: set[tuple[str, ...]] = set()
    while True:
        drawn = tuple(map(chance.choice, choices))
        if drawn not in known:
            known.add(drawn)
            yield drawn


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise OptionError(unknown_name("kind of question", kind, KINDS))
