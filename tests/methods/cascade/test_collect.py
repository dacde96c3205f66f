"""Demonstrations from a teacher: what is kept, what it cost, and runs that were killed."""

from __future__ import annotations

import json
import threading

import pytest
from cascade_fakes import Scripted

from accel.errors import AccelError, ArtifactError, OptionError
from accel.methods.cascade.answerer import Unanswered
from accel.methods.cascade.distill.collect import LOG, Recipe, collect, measured
from accel.methods.cascade.prices import TokenPrice, Usage
from accel.methods.cascade.tasks import Question, Questions

WORLD = Questions([Question(f"{n} + {n}?", str(2 * n)) for n in range(6)], lambda said, known: said == known, "Add.")
PRICE = TokenPrice(1.0, 2.0)


def adds(messages):
    return str(2 * int(messages[-1]["content"].split("\n")[0].split()[1]))


def never_two(messages):
    said = adds(messages)
    return "?" if said == "4" else said


def teacher(script, **changes):
    return Scripted("big", script, **{"price": PRICE} | changes)


def test_successes_are_kept_and_paid_for(tmp_path):
    found = collect(WORLD, WORLD.tasks(4, 0), teacher(never_two), Recipe(), tmp_path, name="sums")
    assert [each.success for each in found] == [True, True, False, True]
    assert [each.demonstration is not None for each in found] == [True, True, False, True]
    kept = found[3].demonstration
    assert (kept.steps[0].observation, kept.steps[0].action, kept.episode, kept.source) == (
        "3 + 3?",
        "6",
        "sums/3",
        "teacher:big",
    )
    # 100 tokens at $1 and 10 at $2 a million, four times
    assert measured(found)["cost"] == pytest.approx(480e-6) and measured(found)["cost_a_task"] == pytest.approx(120e-6)
    assert (measured(found)["success_rate"], measured(found)["input_tokens"]) == (0.75, 400)


def test_failures_are_kept_with_their_outcome_on_request(tmp_path):
    found = collect(WORLD, WORLD.tasks(3, 0), teacher(never_two), Recipe(keep="all"), tmp_path)
    assert [each.demonstration.outcome for each in found] == [1.0, 1.0, 0.0]


def test_a_task_is_tried_until_it_succeeds_and_every_try_is_paid(tmp_path):
    asked = Scripted("big", "?", "?", "0", price=PRICE)
    (found,) = collect(WORLD, WORLD.tasks(1, 0), asked, Recipe(tries=4, temperature=0.5), tmp_path)
    assert (found.success, found.tries, found.usage, found.seconds) == (True, 3, Usage(300, 0, 30), 6.0)
    assert found.cost == pytest.approx(360e-6)
    assert len({settings.seed for _, _, settings, _ in asked.questions}) == 3


def test_a_price_that_is_unknown_makes_the_cost_unknown(tmp_path):
    found = collect(WORLD, WORLD.tasks(2, 0), teacher(adds, price=None), Recipe(), tmp_path)
    assert measured(found)["cost"] is None and measured(found)["cost_a_task"] is None


def test_a_run_goes_on_where_it_ended(tmp_path):
    whole = collect(WORLD, WORLD.tasks(6, 0), teacher(adds), Recipe(), tmp_path / "whole")
    down = Unanswered("big: down", seconds=1.0)

    def dies(messages):
        if "4 + 4" in messages[-1]["content"]:
            raise down
        return adds(messages)

    with pytest.raises(AccelError, match="big: down"):
        collect(WORLD, WORLD.tasks(6, 0), teacher(dies), Recipe(), tmp_path / "cut")
    log = tmp_path / "cut" / LOG
    with open(log, "ab") as file:
        file.write(b'{"task": 4, "succ')  # a kill in the middle of a line
    again = teacher(adds)
    assert collect(WORLD, WORLD.tasks(6, 0), again, Recipe(workers=2), tmp_path / "cut") == whole
    assert [question[-1]["content"][:5] for question, *_ in again.questions] == ["Obser"] * 2
    assert len(log.read_text().splitlines()) == 7
    assert collect(WORLD, WORLD.tasks(6, 0), teacher("nobody asks"), Recipe(), tmp_path / "cut") == whole


@pytest.mark.parametrize("changes", [{"max_tokens": 9}, {"seed": 1}, {"history": 2}])
def test_another_runs_work_is_refused(tmp_path, changes):
    collect(WORLD, WORLD.tasks(2, 0), teacher(adds), Recipe(), tmp_path)
    with pytest.raises(ArtifactError, match="is of another run"):
        collect(WORLD, WORLD.tasks(2, 0), teacher(adds), Recipe(**changes), tmp_path)
    with pytest.raises(ArtifactError, match="is of another run"):
        collect(WORLD, WORLD.tasks(3, 0), teacher(adds), Recipe(), tmp_path)


def test_a_line_that_is_no_task_is_named(tmp_path):
    collect(WORLD, WORLD.tasks(2, 0), teacher(adds), Recipe(), tmp_path)
    log = tmp_path / LOG
    log.write_text(log.read_text() + json.dumps({"task": 1}) + "\n")
    with pytest.raises(ArtifactError, match=r"episodes\.jsonl:4: no finished task"):
        collect(WORLD, WORLD.tasks(2, 0), teacher(adds), Recipe(), tmp_path)


def test_tasks_run_side_by_side(tmp_path):
    meet = threading.Barrier(3, timeout=10)

    def together(messages):
        meet.wait()  # ends only where three are asked at once
        return adds(messages)

    found = collect(WORLD, WORLD.tasks(3, 0), teacher(together), Recipe(workers=3), tmp_path)
    assert [each.task for each in found] == [0, 1, 2] and all(each.success for each in found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tries": 0}, "tries=0"),
        ({"tries": 2}, "every try would be the same"),
        ({"keep": "some"}, "choose from success, all"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(OptionError, match=says):
        Recipe(**changes)
