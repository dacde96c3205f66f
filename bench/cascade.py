"""The suite `cascade`: cost against accuracy of a teacher, a student, the student with demonstrations, and a cascade.

Tasks have exact checkers (bench.household, bench.desk). The student is a model on this machine; the teacher an
endpoint, or a simulated one of a stated accuracy (bench.simulated). All arms go through one router and one ledger. A
random mix of teacher and student is computed from them: what a coin would do at the same cost.
Measures only; cascade_report shows.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import accel
from accel.bench import desk, environment, household, saving, summary
from accel.bench.metrics import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED, paired, wilson
from accel.bench.simulated import Conversation, SimulatedTeacher
from accel.errors import OptionError
from accel.methods.cascade.accounting import TEACHER as ESCALATED_TO
from accel.methods.cascade.accounting import Ledger, break_even
from accel.methods.cascade.agreement import normalised
from accel.methods.cascade.answerer import Answerer, Messages, Reply, Sampling
from accel.methods.cascade.build import endpoint
from accel.methods.cascade.distill.collect import Collected, Recipe, collect, measured
from accel.methods.cascade.embedding import Embedder, find_embedder
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.local import LocalAnswerer
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prices import LISTED, Price, PriceTable, Usage
from accel.methods.cascade.prompt import PLAIN, QUESTIONS, Layout, with_demonstrations
from accel.methods.cascade.router import Cascade, NoAnswer
from accel.methods.cascade.store import DemonstrationStore, Situation
from accel.methods.cascade.tasks import Environment, Question, Questions, play, question

Told = Callable[[str], None]

SUITE = "cascade"
TEACHER, STUDENT, DEMOS, CASCADE = "teacher", "student", "student + demos", "cascade"
# the share of three samples that must agree
THRESHOLDS = (2 / 3, 1.0)
# who pays what where nobody says: the paper's teacher, and the cheapest model of the list, which a student of 135M
# parameters is not dearer than
TEACHER_PRICE, STUDENT_PRICE = "claude-sonnet-4-5", "gpt-4.1-nano"
# demonstrations come from tasks of this seed; those that are measured from others
DEMOS_SEED = 99
# the bars: of the teacher's success, at this share of its cost; time of three samples over one
KEPT, COST, SHARED = 0.9, 0.5, 1.5
# runs of three samples and of one, side by side
SHARED_RUNS = 5


@dataclass(frozen=True)
class Workload:
    """Tasks, and how a student is asked. ``right``: what a teacher of ours says to a question; ``wrong``: what it says
    when it errs. ``valid``: whether a text is an answer at all where it is said, which an agent can know: an action
    that can be done, a code that there is."""

    name: str
    environment: Environment
    right: Callable[[Conversation], str]
    wrong: Callable[[Conversation], str]
    layout: Layout
    compare: str
    max_tokens: int
    stop: tuple[str, ...]
    valid: Callable[[Situation, str], bool]


@dataclass(frozen=True)
class Plan:
    """``teacher``: MODEL@URL, None for the simulated one. ``limit``: tasks of each workload and seed."""

    model: str
    teacher: str | None = None
    workloads: tuple[str, ...] = ("household", "labels", "extraction")
    limit: int = 8
    repeat: int = 3
    seed: int = 0
    # the simulated teacher's, of each answer
    accuracy: float = 0.97
    # tasks that demonstrations are collected from, of each workload
    collect: int = 150
    demonstrations: int = 6
    samples: int = 3
    temperature: float = 0.3
    embedder: str | None = None
    prices: Path | None = None
    key_variable: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("limit", "repeat", "collect", "demonstrations"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.seed <= DEMOS_SEED - self.repeat:
            raise OptionError(f"seed={self.seed}: must be in 0..{DEMOS_SEED - self.repeat}")
        if self.samples < 2:
            raise OptionError(f"samples={self.samples}: two at least can agree")
        unknown = [name for name in self.workloads if name not in WORKLOADS]
        if unknown or not self.workloads:
            raise OptionError(f"tasks {', '.join(unknown) or 'none'}: choose from {', '.join(WORKLOADS)}")


def carry_out(plan: Plan, told: Told = lambda message: None) -> dict[str, Any]:
    """Measure as ``plan`` says and return the document, which is also written to ``plan.output`` as it grows."""
    told("loading the student …")
    loaded = accel.load(plan.model, device=plan.device, dtype=plan.dtype)
    if loaded.tokenizer is None:
        raise OptionError(f"{plan.model} brings no tokenizer: a cascade asks in words")
    prices = PriceTable() if plan.prices is None else PriceTable.read(plan.prices)
    price = prices.of(plan.model) if plan.model in prices else LISTED[STUDENT_PRICE]
    student = Remembering(LocalAnswerer(loaded.model, loaded.tokenizer, name=plan.model, price=price))
    embedder = find_embedder(plan.embedder, model=loaded.model, tokenizer=loaded.tokenizer)
    document = summary.frame(
        settings=_settings(plan, embedder, price, str(loaded.model.dtype).removeprefix("torch.")),
        environment=environment.describe(loaded.model.device),
        command=plan.command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=False,
    )
    document |= {"workloads": {}}
    for name in plan.workloads:
        workload = WORKLOADS[name]()
        with _teacher(plan, workload, prices, loaded.tokenizer) as teacher, TemporaryDirectory() as folder:
            bench = _Bench(plan, workload, student, teacher, told)
            collected = bench.demonstrate(Path(folder))
            shown = [each.demonstration for each in collected if each.demonstration is not None]
            with DemonstrationStore(Path(folder) / "demonstrations.db", embedder) as store:
                store.add(shown)
                records = bench.records(store)
                shared = bench.shared_prompt(store)
        document["settings"]["teacher_price"] = None if teacher.price is None else teacher.price.as_dict()
        taken = measured(collected)
        document["workloads"][name] = {
            "collected": taken,
            "demonstrations": len(shown),
            "arms": summarise(records),
            "compared": compared(records, len(collected), taken["cost_a_task"]),
            "shared_prompt": shared,
            "records": records,
        }
        if plan.output:
            saving.write(plan.output, saving.dump(document))
    document["complete"] = True
    document["verdicts"] = verdicts(document)
    if plan.output:
        saving.write(plan.output, saving.dump(document))
    return document


def _settings(plan: Plan, embedder: Embedder, price: Price, dtype: str) -> dict[str, Any]:
    names = ("model", "limit", "repeat", "seed", "collect", "demonstrations", "samples", "temperature")
    return {
        "suite": SUITE,
        **{name: getattr(plan, name) for name in names},
        "teacher": plan.teacher or SimulatedTeacher.model,
        "teacher_accuracy": plan.accuracy if plan.teacher is None else None,
        "dtype": dtype,
        "embedder": embedder.name,
        "student_price": price.as_dict(),
    }


class Remembering:
    """An ``Answerer`` that says what it said before to the same question with the same settings.

    Samples are drawn with seeds, so that an arm which comes to a place where another one was would hear the same:
    it is answered from memory, with the tokens and seconds of then, and charged like the first.
    """

    def __init__(self, inner: Answerer) -> None:
        self.inner = inner
        self.name, self.price = inner.name, inner.price
        self._said: dict[str, Reply] = {}

    @property
    def shares_prompt(self) -> bool:
        return self.inner.shares_prompt

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        key = json.dumps([[dict(each) for each in messages], n, vars(settings)])
        if key not in self._said:
            self._said[key] = self.inner.sample(messages, n, settings, seconds=seconds)
        return self._said[key]


@contextmanager
def _teacher(plan: Plan, workload: Workload, prices: PriceTable, tokenizer: Any) -> Iterator[Endpoint]:
    """Whoever teaches: an endpoint, or ours."""
    if plan.teacher is not None:
        real = endpoint(plan.teacher, plan.key_variable, prices)
        try:
            yield real
        finally:
            real.close()
        return

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    with SimulatedTeacher(workload.right, workload.wrong, count, accuracy=plan.accuracy, seed=plan.seed) as simulated:
        name = simulated.model
        price = prices.of(name) if name in prices else LISTED[TEACHER_PRICE]
        client = Endpoint(simulated.url, name, price=price)
        try:
            yield client
        finally:
            client.close()


@dataclass(frozen=True)
class _Bench:
    """One workload's runs."""

    plan: Plan
    workload: Workload
    student: Remembering
    teacher: Endpoint
    told: Told

    def demonstrate(self, folder: Path) -> list[Collected]:
        """What the teacher does on tasks of its own; its successes are what the student is shown."""
        world, workload = self.workload.environment, self.workload
        return collect(
            world,
            world.tasks(self.plan.collect, DEMOS_SEED),
            self.teacher,
            Recipe(max_tokens=workload.max_tokens, stop=workload.stop, layout=workload.layout),
            folder,
            name=f"{workload.name}/{DEMOS_SEED}",
            progress=lambda message: self.told(f"{workload.name}: demonstrations, {message}"),
        )

    def records(self, store: DemonstrationStore) -> list[dict[str, Any]]:
        """Every arm on every task."""
        found = []
        for seed in range(self.plan.seed, self.plan.seed + self.plan.repeat):
            arms = self._arms(store, seed)
            for number, task in enumerate(self.workload.environment.tasks(self.plan.limit, seed)):
                for name, cascade in arms.items():
                    self.told(f"{self.workload.name}: seed {seed}, task {number + 1} of {self.plan.limit}, {name} …")
                    found.append({"seed": seed, "task": number, "arm": name, **self._one(cascade, task, seed, number)})
        return found

    def shared_prompt(self, store: DemonstrationStore) -> dict[str, Any]:
        """Seconds of three samples that share a prompt with demonstrations over those of one; least and most of
        runs side by side."""
        self.told(f"{self.workload.name}: three samples against one …")
        world, layout = self.workload.environment, self.workload.layout
        task = world.tasks(1, self.plan.seed)[0]
        seen = world.Episode(task).observation
        shown = store.retrieve(Situation(goal=task.goal, observation=seen), self.plan.demonstrations, window=1)
        asked = with_demonstrations(question(world.SYSTEM, task.goal, seen, layout), shown, layout)
        settings = self._options(seed=self.plan.seed).student_sampling(0)

        def seconds(n: int) -> float:
            return self.student.inner.sample(asked, n, settings, seconds=600).seconds

        # three and one in turn
        runs = [(seconds(3), seconds(1)) for _ in range(SHARED_RUNS)]
        usage = self.student.inner.sample(asked, 1, settings, seconds=600).usage
        return {
            "tokens": None if usage is None else usage.input_tokens,
            "three_over_one": paired([three for three, _ in runs], [one for _, one in runs]),
        }

    def _arms(self, store: DemonstrationStore, seed: int) -> dict[str, Cascade]:
        layout = self.workload.layout
        single = {"samples": 1, "temperature": 0.0, "seed": seed}
        arms = {
            TEACHER: Cascade(self.teacher, None, self._options(**single, demonstrations=0)),
            STUDENT: Cascade(self.student, None, self._options(**single, demonstrations=0)),
            DEMOS: Cascade(self.student, None, self._options(**single), store=store, layout=layout),
        }
        for share in THRESHOLDS:
            options = self._options(seed=seed, threshold=share)
            arms[named(share)] = Cascade(self.student, self.teacher, options, store=store, layout=layout)
        return arms

    def _options(self, **changes: Any) -> CascadeOptions:
        plan, workload = self.plan, self.workload
        usual = {
            "samples": plan.samples,
            "temperature": plan.temperature,
            "demonstrations": plan.demonstrations,
            "window": 1,
            "compare": workload.compare,
            "max_tokens": workload.max_tokens,
            "stop": workload.stop,
            "student_seconds": 600.0,
        }
        return CascadeOptions(**{**usual, **changes})

    def _one(self, cascade: Cascade, task: Any, seed: int, number: int) -> dict[str, Any]:
        """One task, and what it took. A question that nobody answered is answered with nothing."""
        asked: list[Ledger] = []

        def ask(messages: list[dict[str, str]], situation: Situation) -> str:
            def valid(text: str) -> bool:
                return self.workload.valid(situation, text)

            try:
                # nobody else can be asked where there is no teacher
                answer = cascade.answer(messages, situation, valid if cascade.teacher is not None else None)
            except NoAnswer as error:
                asked.append(error.ledger)
                return ""
            asked.append(answer.ledger)
            return answer.text

        world = self.workload.environment
        name = f"{self.workload.name}/{seed}/{number}"
        done = play(world.Episode(task), task.goal, ask, system=world.SYSTEM, layout=self.workload.layout, name=name)
        costs = [ledger.cost for ledger in asked]
        return {
            "success": done.success,
            "steps": len(done.steps),
            "escalated": sum(any(each.role == ESCALATED_TO for each in ledger.attempts) for ledger in asked),
            "cost": None if None in costs else math.fsum(cost for cost in costs if cost is not None),
            "tokens": vars(sum((ledger.usage for ledger in asked), Usage())),
            "seconds": math.fsum(attempt.seconds for ledger in asked for attempt in ledger.attempts),
        }


def named(share: float) -> str:
    return f"{CASCADE} {share:.2g}"


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row an arm: success with its interval over tasks, by seed, and $, steps and seconds of an episode."""
    reference = _cost([each for each in records if each["arm"] == TEACHER])
    rows = {}
    for arm in dict.fromkeys(each["arm"] for each in records):
        mine = [each for each in records if each["arm"] == arm]
        successes, cost = sum(each["success"] for each in mine), _cost(mine)
        low, high = wilson(successes, len(mine))
        steps = sum(each["steps"] for each in mine)
        rows[arm] = {
            "episodes": len(mine),
            "success": successes / len(mine),
            "low": low,
            "high": high,
            "by_seed": [
                fmean(each["success"] for each in mine if each["seed"] == seed)
                for seed in sorted({each["seed"] for each in mine})
            ],
            "cost": cost,
            "relative_cost": None if cost is None or not reference else cost / reference,
            "steps": steps / len(mine),
            "escalated": sum(each["escalated"] for each in mine) / steps if steps else 0.0,
            "seconds": fmean(each["seconds"] for each in mine),
        }
    return rows


def compared(records: Sequence[Mapping[str, Any]], demonstrations: int, teacher_cost: float | None) -> dict[str, Any]:
    """Each cascade against a coin that sends so many whole episodes to the teacher, and the others to the student with
    demonstrations, that the cost is the same; and after how many episodes its demonstrations are paid for.

    ``teacher_cost``: $ of a task that demonstrations were collected from.
    """
    found = {}
    for arm in dict.fromkeys(each["arm"] for each in records if each["arm"].startswith(CASCADE)):
        table = _by_task(records, (arm, DEMOS, TEACHER))
        if table is None:
            continue
        found[arm] = {
            "random_mix": random_mix(table),
            **_intervals(table),
            "break_even": None
            if teacher_cost is None
            else finite(break_even(demonstrations, teacher_cost, float(table[:, 0, 1].mean()))),
        }
    return found


def finite(value: float) -> float | None:
    """None for a number of episodes that never comes."""
    return value if math.isfinite(value) else None


def random_mix(table: np.ndarray) -> float:
    """The success of a coin at the first arm's cost; ``table`` [tasks, arms, (success, cost)] of a cascade, the
    student and the teacher."""
    (_, cost), (student, cheap), (teacher, dear) = table.mean(0)
    share = float(np.clip((cost - cheap) / (dear - cheap), 0, 1)) if dear > cheap else 0.0
    return float(student + share * (teacher - student))


def _intervals(table: np.ndarray) -> dict[str, list[float]]:
    """Bootstrap 95 % intervals over tasks, each with all of its arms: more than the coin, more than the student, and
    the shares of the teacher's success and cost."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(table), (BOOTSTRAP_SAMPLES, len(table)))
    again = [table[draw] for draw in draws]

    def interval(of: Callable[[np.ndarray], float]) -> list[float]:
        values = [of(each) for each in again]
        low, high = np.nanpercentile(values, [2.5, 97.5])
        return [of(table), float(low), float(high)]

    def over(each: np.ndarray, column: int) -> float:
        mine, _, theirs = each[:, :, column].mean(0)
        return float(mine / theirs) if theirs else math.nan

    return {
        "over_mix": interval(lambda each: float(each[:, 0, 0].mean()) - random_mix(each)),
        "over_student": interval(lambda each: float((each[:, 0, 0] - each[:, 1, 0]).mean())),
        "of_teachers_success": interval(lambda each: over(each, 0)),
        "of_teachers_cost": interval(lambda each: over(each, 1)),
    }


def _by_task(records: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> np.ndarray | None:
    """[tasks, arms, (success, cost)]; None where a cost is unknown."""
    tasks = dict.fromkeys((each["seed"], each["task"]) for each in records)
    rows = {(each["seed"], each["task"], each["arm"]): each for each in records}
    cells = [[[rows[*task, arm]["success"], rows[*task, arm]["cost"]] for arm in arms] for task in tasks]
    if any(cost is None for row in cells for _, cost in row):
        return None
    return np.asarray(cells, dtype=float)


def verdicts(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The bars, at full agreement: success kept and its cost, against the student and against a coin."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in document["workloads"].items():
        arms, versus = each["arms"], each["compared"].get(named(THRESHOLDS[-1]))
        if versus is None:
            continue
        found[name] = {
            "demonstrations help": arms[DEMOS]["success"] > arms[STUDENT]["success"],
            "success kept": versus["of_teachers_success"][0] >= KEPT,
            "cost": versus["of_teachers_cost"][0] <= COST,
            "better than a coin": versus["over_mix"][0] > 0,
            "three samples": each["shared_prompt"]["three_over_one"][0] <= SHARED,
        }
    return found


def _cost(records: Sequence[Mapping[str, Any]]) -> float | None:
    """$ of an episode."""
    costs = [each["cost"] for each in records]
    return None if None in costs or not costs else fmean(costs)


# -- the tasks --


def _household() -> Workload:
    def read(messages: Conversation) -> tuple[str, str]:
        """Goal and observation of the last question."""
        lines = messages[-1]["content"].splitlines()
        return lines[0].removeprefix(f"{PLAIN.goal} "), lines[-2].removeprefix(f"{PLAIN.observation} ")

    def wrong(messages: Conversation) -> str:
        goal, observation = read(messages)
        others = [each for each in household.options(observation, goal) if each != household.expert(goal, observation)]
        return random.Random(observation + goal).choice(others or ["wait"])

    def valid(situation: Situation, text: str) -> bool:
        return household.said(text) in household.options(situation.observation, situation.goal)

    return Workload(
        "household",
        household,
        lambda messages: household.expert(*read(messages)),
        wrong,
        replace(PLAIN, place="turns"),
        "normalised",
        16,
        LINE,
        valid,
    )


def _desk(kind: str) -> Workload:
    def known(messages: Conversation) -> desk.Question:
        return asked[messages[-1]["content"].splitlines()[0].removeprefix(f"{QUESTIONS.observation} ")]

    asked: dict[str, desk.Question] = {}
    codes = {normalised(code) for code in desk.CODES}

    class World(Questions):
        """Questions that are drawn, and remembered for the teacher."""

        def tasks(self, count: int, seed: int) -> Sequence[Question]:
            drawn = desk.questions(kind, count, seed)
            asked.update({each.text: each for each in drawn})
            return [Question(each.text, each.answer) for each in drawn]

    def right(said: str, answer: str) -> bool:
        return desk.right(desk.Question(kind, "", answer), said)

    return Workload(
        kind,
        World((), right, desk.SYSTEM_LABELS if kind == "labels" else desk.SYSTEM_EXTRACTION),
        lambda messages: known(messages).answer,
        lambda messages: desk.wrong(known(messages), random.Random(messages[-1]["content"])),
        replace(QUESTIONS, place="turns"),
        "normalised" if kind == "labels" else "json",
        12 if kind == "labels" else 64,
        LINE,
        lambda _, text: kind != "labels" or normalised(text) in codes,
    )


LINE = ("\n",)
WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "household": _household,
    "labels": lambda: _desk("labels"),
    "extraction": lambda: _desk("extraction"),
}
