"""The suite `cascade`: its arithmetic by hand, its tasks' teachers, and a whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from byte_models import save_byte_llama
from cascade_fakes import Scripted
from click.testing import CliRunner
from refusals import refusal

from accel.bench import cascade, cascade_report
from accel.bench.cascade import DEMOS, STUDENT, TEACHER, Plan, Remembering, named
from accel.cli.main import main
from accel.methods.cascade.answerer import Sampling
from accel.methods.cascade.tasks import play


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def record(seed, task, arm, success, cost, steps=2, escalated=0):
    names = ("seed", "task", "arm", "success", "cost", "steps", "escalated")
    return dict(zip(names, (seed, task, arm, success, cost, steps, escalated), strict=True)) | {"seconds": 1.0}


FULL = named(1.0)
# four tasks of two seeds: the teacher always, the student never, its demonstrations help in one, a cascade in three
RECORDS = [
    record(seed, task, arm, success, cost, escalated=escalated)
    for seed in (0, 1)
    for task in (0, 1)
    for arm, success, cost, escalated in (
        (TEACHER, True, 10.0, 0),
        (STUDENT, False, 1.0, 0),
        (DEMOS, (seed, task) == (0, 0), 2.0, 0),
        (FULL, (seed, task) != (1, 1), 4.0, 1),
    )
]


def test_rows_of_the_table_by_hand():
    rows = cascade.summarise(RECORDS)
    assert [rows[arm]["success"] for arm in (TEACHER, STUDENT, DEMOS, FULL)] == [1.0, 0.0, 0.25, 0.75]
    assert [rows[arm]["relative_cost"] for arm in (TEACHER, STUDENT, DEMOS, FULL)] == [1.0, 0.1, 0.2, 0.4]
    assert rows[FULL]["by_seed"] == [1.0, 0.5] and rows[FULL]["escalated"] == 0.5
    assert rows[FULL]["low"] < 0.75 < rows[FULL]["high"]


def test_a_coin_at_the_same_cost_by_hand():
    found = cascade.compared(RECORDS, 100, 10.0)[FULL]
    # (4 − 2) / (10 − 2) = a quarter of the tasks go to the teacher: 0.25 · 1 + 0.75 · 0.25
    assert found["random_mix"] == pytest.approx(0.4375)
    assert found["over_mix"][0] == pytest.approx(0.75 - 0.4375)
    assert found["over_mix"][1] <= found["over_mix"][0] <= found["over_mix"][2]
    assert found["of_teachers_success"][0] == 0.75 and found["of_teachers_cost"] == [0.4, 0.4, 0.4]
    # 100 · 10 / (10 − 4)
    assert found["break_even"] == pytest.approx(1000 / 6)


def test_a_coin_never_pays_more_than_the_teacher():
    table = np.array([[[1.0, 12.0], [0.0, 2.0], [1.0, 10.0]]])
    assert cascade.random_mix(table) == 1.0
    table[:, 0, 1] = 1.0
    assert cascade.random_mix(table) == 0.0


def test_unknown_costs_compare_nothing():
    records = [each | {"cost": None} if each["arm"] == FULL else each for each in RECORDS]
    assert cascade.compared(records, 100, 10.0) == {}
    assert cascade.summarise(records)[FULL]["relative_cost"] is None


def test_calibration_takes_the_best_within_a_budget():
    rows = cascade.summarise(RECORDS)
    assert cascade_report.calibrated(rows, 1.0) == TEACHER
    assert cascade_report.calibrated(rows, 0.5) == FULL
    assert cascade_report.calibrated(rows, 0.2) == DEMOS
    assert cascade_report.calibrated(rows, 0.05) is None


def test_what_was_said_is_said_again():
    inner = Scripted("small", "a", "b", "c")
    student = Remembering(inner)
    asked, settings = [{"role": "user", "content": "q"}], Sampling(0.5, 8, seed=1)
    first = student.sample(asked, 1, settings, seconds=1)
    assert student.sample(asked, 1, settings, seconds=9) == first
    assert student.sample(asked, 1, Sampling(0.5, 8, seed=2), seconds=1).samples != first.samples
    assert student.sample(asked, 2, settings, seconds=1).samples != first.samples
    assert len(inner.questions) == 3


@pytest.mark.parametrize("name", cascade.WORKLOADS)
def test_teachers_are_right_and_their_mistakes_are_wrong(name):
    workload = cascade.WORKLOADS[name]()
    world = workload.environment
    for task in world.tasks(12, 3):
        done = play(
            world.Episode(task), task.goal, lambda m, _: workload.right(m), system=world.SYSTEM, layout=workload.layout
        )
        assert done.success

        def errs(messages, situation):
            said = workload.wrong(messages)
            assert said != workload.right(messages)
            return said

        episode = world.Episode(task)
        play(episode, task.goal, errs, system=world.SYSTEM, layout=workload.layout)
        assert name == "household" or not episode.success


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    folder = save_byte_llama(tmp_path / "model", max_position_embeddings=8192)
    output, svg = tmp_path / "out.json", tmp_path / "out.svg"
    given = ("bench", folder, "--suite", "cascade", "--tasks", "labels", "--limit", "2", "--repeat", "2")
    given += ("--collect", "6", "--accuracy", "1.0", "--output", output, "--svg", svg)
    result = CliRunner().invoke(main, [*map(str, given)])
    assert result.exit_code == 0, result.output
    assert "SIMULATED" in result.stdout and "random mix at its cost" in result.stdout
    document = json.loads(output.read_text())
    labels = document["workloads"]["labels"]
    assert document["complete"] and labels["demonstrations"] == 6
    arms = labels["arms"]
    # a random model agrees with nobody: every question goes to the teacher, who is right, and the drafts are charged
    assert (arms[TEACHER]["success"], arms[DEMOS]["success"]) == (1.0, 0.0)
    assert arms[FULL]["success"] == arms[FULL]["escalated"] == 1.0 and arms[FULL]["relative_cost"] > 1
    assert "dearer than the teacher alone" in result.stdout
    assert document["verdicts"]["labels"]["cost"] is False
    assert labels["shared_prompt"]["tokens"] > 500 and svg.read_text().startswith("<svg")
    assert cascade_report.terminal(document) == result.stdout


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"limit": 0}, "limit=0"),
        ({"samples": 1}, "two at least"),
        ({"workloads": ("chess",)}, "tasks chess: choose from household, labels, extraction"),
        ({"seed": 98}, "seed=98"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes, says):
    assert says in refusal(lambda: Plan("x", **changes))
