"""Questions of the desk: told apart, balanced, and checked by what the answers mean."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest
from refusals import refusal

from accel.bench import dealing, desk
from accel.bench.desk import CODES, KINDS, Question, questions, right, wrong

SEEDS = (0, 1, 2, 3, 50, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_repeat_and_no_two_are_alike(kind):
    drawn = {seed: questions(kind, 300, seed) for seed in SEEDS}
    texts = [question.text for each in drawn.values() for question in each]
    assert len(set(texts)) == len(texts) == 300 * len(SEEDS)
    assert drawn[1] == questions(kind, 300, 1) and drawn[1][:50] == questions(kind, 50, 1)
    assert all(
        question.kind == kind and len(question.text.split()) <= 24 for each in drawn.values() for question in each
    )
    assert len(questions(kind, desk.MOST_QUESTIONS, 4)) == desk.MOST_QUESTIONS


def test_what_is_said_tells_the_team():
    """Every message of every team, without what is dealt: none could come from two teams or be put together twice."""
    said = [
        (f"{opening}{subject} {complaint}", team.code)
        for team in desk.TEAMS
        for opening, subject, complaint in itertools.product(desk.OPENINGS, team.subjects, team.complaints)
    ]
    assert len({text for text, _ in said}) == len(said) == 12 * 8 * 6 * 6
    assert len(set(CODES)) == 12
    words = [set(f"{' '.join(team.subjects)} {' '.join(team.complaints)}".lower().split()) for team in desk.TEAMS]
    assert not any(code.removeprefix("T-").lower() in each for code in CODES for each in words)


def test_labels_are_balanced_and_right():
    drawn = questions("labels", 120, 7)
    assert Counter(question.answer for question in drawn) == dict.fromkeys(CODES, 10)
    of_team = {team.code: team for team in desk.TEAMS}
    for question in drawn:
        team = of_team[question.answer]
        assert any(f"{each} " in question.text for each in team.subjects)
        assert any(question.text.endswith(f" {each}.") for each in team.complaints)


def test_orders_say_what_was_ordered():
    """Read back from the text by its words, in another way than they were written."""
    for question in questions("extraction", 300, 7):
        order = json.loads(question.answer)
        words = question.text.replace(",", " ").replace(".", " ").replace(":", " ").replace("?", " ").split()
        (unit,) = set(words) & set(desk.UNITS)
        (month,) = set(words) & set(desk.MONTHS)
        day = int(words[words.index(month) - 1])
        amount = int(words[words.index(unit) - 1])
        (colour,) = set(words) & set(desk.COLOURS)
        assert list(order) == ["item", "amount", "unit", "day"]
        assert order["item"] == f"{colour} {words[words.index(colour) + 1]}" and order["amount"] == amount
        assert order["unit"] == desk.UNITS[unit] and order["day"] == f"{desk.MONTHS.index(month) + 1:02}-{day:02}"
        assert unit not in question.answer and month not in question.answer


def test_words_of_orders_have_one_meaning():
    words = (*desk.COLOURS, *desk.GOODS, *desk.UNITS, *desk.MONTHS)
    assert len(set(words)) == len(words) and len(set(desk.UNITS.values())) == len(desk.UNITS)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_answers_are_wrong(kind):
    chance = random.Random(1)
    for question in questions(kind, 200, 8):
        said = [wrong(question, chance) for _ in range(12)]
        assert right(question, question.answer) and not any(right(question, each) for each in said)
        assert len(set(said)) > 2
        if kind == "labels":
            assert set(said) <= set(CODES)
        else:
            right_order = json.loads(question.answer)
            for each in map(json.loads, said):
                assert each.keys() == right_order.keys()
                assert sum(each[key] != right_order[key] for key in each) == 1
    again = random.Random(1)
    question = questions(kind, 1, 8)[0]
    assert wrong(question, random.Random(1)) == wrong(question, again)


def test_a_day_that_reads_the_same_both_ways():
    order = Question("extraction", "", '{"item": "red pens", "amount": 2, "unit": "BX", "day": "05-05"}')
    said = {wrong(order, random.Random(seed)) for seed in range(50)}
    assert len(said) >= 8 and not any(right(order, each) for each in said)


COUNTS = [
    (
        *("labels", "T-ONYX"),
        ["T-ONYX", " t-onyx.\n", '"T-ONYX"'],
        ["", "T-ORCHID", "ONYX", "T-ONYX or T-CEDAR", "The team is T-ONYX"],
    ),
    (
        *("extraction", '{"item": "red pens", "amount": 4}'),
        ['{"amount":4.0,"item":"red pens"}', '```json\n{"item": "red pens", "amount": 4}\n```'],
        [
            *("", "{}", "red pens, 4", '{"item": "red pens", "amount": 4', '{"item": "red pens", "amount": "4"}'),
            *('{"item": "Red pens", "amount": 4}', '{"item": "red pens", "amount": 4, "unit": "BX"}'),
        ],
    ),
]


@pytest.mark.parametrize(("kind", "answer", "good", "bad"), COUNTS)
def test_what_counts_as_right(kind, answer, good, bad):
    question = Question(kind, "", answer)
    assert all(right(question, said) for said in good)
    assert not any(right(question, said) for said in bad)


def test_what_students_are_told():
    for system in (desk.SYSTEM_LABELS, desk.SYSTEM_EXTRACTION):
        assert len(system.split()) <= 25
        # the house's codes are learned from demonstrations alone
        assert not any(code in system for code in (*CODES, *desk.UNITS.values()))


def test_refusals():
    assert "extraction, labels" in refusal(lambda: questions("sums", 1, 0))
    assert str(desk.MOST_QUESTIONS) in refusal(lambda: questions("labels", desk.MOST_QUESTIONS + 1, 0))
    assert f"seed={dealing.SEEDS}" in refusal(lambda: questions("labels", 1, dealing.SEEDS))
