"""Money: hand-computed cases to the last digit, the paper's break-even figures, and what is never left out."""

from __future__ import annotations

import json
import math

import pytest
from refusals import refusal

from accel.methods.cascade.accounting import STUDENT, TEACHER, Attempt, Ledger, Totals, break_even
from accel.methods.cascade.prices import FREE, HourPrice, PriceTable, TokenPrice, Usage

MINI, SONNET = TokenPrice(0.40, 1.60, 0.10), TokenPrice(3.00, 15.00, 0.30)


def student(usage: Usage = Usage(1000, 600, 50), **changes) -> Attempt:  # noqa: B008 - frozen
    return Attempt("mini", STUDENT, usage, 0.5, **{"price": MINI, "samples": 3} | changes)


def teacher(usage: Usage = Usage(800, 0, 40), **changes) -> Attempt:  # noqa: B008 - frozen
    return Attempt("sonnet", TEACHER, usage, 2.0, **{"price": SONNET} | changes)


@pytest.mark.parametrize(
    ("price", "usage", "seconds", "dollars"),
    [
        # 400 · 0.40 + 600 · 0.10 + 50 · 1.60 = 160 + 60 + 80 = 300 millionths
        (MINI, Usage(1000, 600, 50), 9.0, 0.0003),
        # 800 · 3 + 40 · 15 = 3000 millionths
        (SONNET, Usage(800, 0, 40), 9.0, 0.003),
        # without a price of its own, cached input is input: 1000 · 2 + 10 · 8
        (TokenPrice(2.0, 8.0), Usage(1000, 1000, 10), 0.0, 0.00208),
        (TokenPrice(2.0, 8.0, 0.0), Usage(1000, 1000, 10), 0.0, 0.00008),
        # 90 seconds of a $4 machine, whatever the tokens
        (HourPrice(4.0), Usage(10**6, 0, 10**6), 90.0, 0.1),
        (FREE, Usage(5, 0, 5), 1.0, 0.0),
        (SONNET, Usage(), 1.0, 0.0),
    ],
)
def test_an_attempt_costs_what_a_hand_computes(price, usage, seconds, dollars):
    assert Attempt("m", STUDENT, usage, seconds, price).cost == dollars


def test_an_accepted_draft_saves_the_teacher():
    ledger = Ledger((student(),), "mini", agreement=1.0, teacher_estimate=0.003)
    assert (ledger.cost, ledger.teacher_only, ledger.estimated) == (0.0003, 0.003, True)
    assert ledger.saved == 0.003 - 0.0003


def test_a_rejected_draft_is_charged():
    ledger = Ledger((student(rejected=True), teacher()), "sonnet", agreement=1 / 3, teacher_estimate=99.0)
    assert ledger.cost == math.fsum([0.0003, 0.003])
    # what the teacher really took goes before any estimate
    assert (ledger.teacher_only, ledger.estimated) == (0.003, False)
    assert ledger.saved == pytest.approx(-0.0003, abs=1e-18)
    assert ledger.usage == Usage(1800, 600, 90)


def test_failures_are_charged_and_the_teacher_alone_would_have_had_them():
    garbage = teacher(Usage(800, 0, 10), rejected=True, error="empty answer")
    ledger = Ledger((student(rejected=True), garbage, teacher()), "sonnet")
    assert ledger.cost == math.fsum([0.0003, 0.00255, 0.003])
    assert ledger.teacher_only == math.fsum([0.00255, 0.003])
    # a teacher that never answered is no measure of what answering costs
    fallback = Ledger((student(), garbage), "mini", teacher_estimate=0.003)
    assert (fallback.teacher_only, fallback.estimated) == (0.003, True)
    assert fallback.cost == math.fsum([0.0003, 0.00255])


def test_an_unknown_price_is_unknown_and_not_zero():
    ledger = Ledger((student(price=None), teacher()), "sonnet")
    assert (ledger.cost, ledger.teacher_only, ledger.saved) == (None, 0.003, None)
    totals = Totals()
    totals.add(Ledger((teacher(),), "sonnet"))
    totals.add(ledger)
    assert (totals.cost, totals.teacher_only, totals.saved, totals.relative_cost) == (None, 0.006, None, None)
    assert Ledger((student(),), "mini").saved is None
    # a model that did not say what it read: unknown by the token, known by the hour
    silent = Ledger((student(usage=None), teacher()), "sonnet")
    assert silent.cost is None and silent.usage == Usage(800, 0, 40)
    assert "input_tokens" not in silent.attempts[0].as_dict()
    assert Ledger((student(usage=None, price=HourPrice(3600.0)),), "mini").cost == 0.5


def test_totals_count_who_answered():
    totals = Totals()
    for _ in range(3):
        totals.add(Ledger((student(),), "mini", 1.0, teacher_estimate=0.003))
    totals.add(Ledger((student(rejected=True), teacher()), "sonnet"))
    totals.add(Ledger((teacher(error="down", usage=Usage()),), None, teacher_estimate=0.0))
    assert totals.answered_by == {"mini": 3, "sonnet": 1}
    assert (totals.requests, totals.escalated) == (5, 2)
    assert totals.cost == pytest.approx(4 * 0.0003 + 0.003, rel=1e-15)
    assert totals.teacher_only == pytest.approx(0.012, rel=1e-15)
    assert totals.relative_cost == pytest.approx(0.35, rel=1e-14)
    assert json.loads(json.dumps(totals.as_dict()))["input_tokens"] == 4 * 1000 + 800


@pytest.mark.parametrize(
    ("demonstrations", "teacher_cost", "cascade_cost", "episodes"),
    # ALFWorld: 500 demonstrations, $0.059 an episode, the cascade $0.024. AppWorld: 147, $0.589, 29 % of that
    [(500, 0.059, 0.024, 843), (147, 0.589, 0.171, 207)],
)
def test_the_papers_break_even(demonstrations, teacher_cost, cascade_cost, episodes):
    assert round(break_even(demonstrations, teacher_cost, cascade_cost)) == episodes


def test_break_even_by_hand():
    assert break_even(10, 4.0, 3.0) == 40.0
    assert break_even(0, 4.0, 5.0) == 0.0
    assert break_even(10, 4.0, 4.0) == math.inf == break_even(10, 4.0, 5.0)
    assert "≥ 0" in refusal(lambda: break_even(-1, 4.0, 1.0))


def test_a_ledger_is_json():
    ledger = Ledger((student(rejected=True), teacher()), "sonnet", 1 / 3)
    raw = json.loads(json.dumps(ledger.as_dict()))
    assert raw["model"] == "sonnet" and [a["rejected"] for a in raw["attempts"]] == [True, False]
    assert raw["attempts"][0]["price"] == {"input": 0.4, "output": 1.6, "cached_input": 0.1}
    assert raw["attempts"][0]["cached_tokens"] == 600 and raw["cost"] == ledger.cost


def test_a_users_prices_go_first(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text('{"gpt-4.1-mini": {"input": 1, "output": 2}, "mine": {"per_hour": 2.5}}')
    table = PriceTable.read(path)
    assert table.of("gpt-4.1-mini") == TokenPrice(1, 2)
    assert table.of("mine") == HourPrice(2.5)
    assert table.of("gpt-4o") == PriceTable().of("gpt-4o")
    assert "mine" in table and "mine" not in PriceTable()
    assert "no price for 'nobody'" in refusal(lambda: table.of("nobody"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "must be a JSON object"),
        ('{"m": 3}', "m: a price is"),
        ('{"m": {"input": 1}}', "m: a price is"),
        ('{"m": {"input": 1, "output": -2}}', "output=-2"),
        ('{"m": {"input": 1, "output": "2"}}', "output='2'"),
        ('{"m": {"input": null, "output": 2}}', "input=None"),
        ('{"m": {"per_hour": NaN}}', "per_hour=nan"),
        ('{"m": {"per_hour": true}}', "per_hour=True"),
    ],
)
def test_a_broken_price_file_is_refused(tmp_path, text, says):
    path = tmp_path / "prices.json"
    path.write_text(text)
    assert says in refusal(lambda: PriceTable.read(path))


def test_impossible_attempts_are_refused():
    assert "absent.json cannot be read" in refusal(lambda: PriceTable.read("absent.json"))
    assert "cached_tokens=2 of input_tokens=1" in refusal(lambda: Usage(1, 2))
    assert "output_tokens=-1" in refusal(lambda: Usage(1, 0, -1))
    assert "input_tokens=1.5" in refusal(lambda: Usage(1.5))
    assert "role='judge'" in refusal(lambda: Attempt("m", "judge", Usage(), 0.0, FREE))
    assert "seconds=-1" in refusal(lambda: Attempt("m", STUDENT, Usage(), -1.0, FREE))
