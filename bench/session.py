"""One benchmark from a plan to its document: load, run every prompt, save after each. What the suites share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import accel
from accel.bench import arms, environment, saving, summary, workloads
from accel.bench.measure import Record
from accel.bench.runner import Runner, Settings
from accel.bench.workloads import Prompt
from accel.errors import OptionError

# (runs done, runs in all, prompt, arm), before each run
Progress = Callable[[int, int, Prompt, str], None]
# (records so far, whether these are all) → the document
Summarise = Callable[[Sequence[Record], bool], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What to benchmark and where to leave it; None takes the suite's or torch's own default."""

    model: str
    artifacts: tuple[str, ...] = ()
    suite: str = "default"
    prompt_file: Path | None = None
    limit: int | None = None
    # comma-separated names, as in the table
    arms: str | None = None
    settings: Settings = field(default_factory=Settings)
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    resume: bool = False
    save_detailed: bool = False
    # the command line, for the document
    command: str = ""

    def __post_init__(self) -> None:
        if self.resume and self.output is None:
            raise OptionError("--resume continues the run saved in a file: say which with --output FILE")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads={self.threads}: must be 1 or more")
        self.check()

    def check(self) -> None:
        """What this suite asks of its own fields."""
        if len(self.artifacts) > 1:
            raise OptionError(
                f"{len(self.artifacts)} artifacts given: this suite compares one draft model at a time; "
                "`--suite drafts` compares several"
            )
        arms.check(self.arms, bool(self.artifacts))


@dataclass(frozen=True)
class Ground:
    """What a benchmark stands on once everything is loaded."""

    plan: Plan
    prompts: list[Prompt]
    model: Any
    tokenizer: Any
    machine: dict[str, Any]
    # the unfinished document to go on with
    found: dict[str, Any] | None
    date: str

    @classmethod
    def prepare(cls, plan: Plan) -> Ground:
        """Read, check and load, cheapest first: a mistake is told before minutes are spent on loading."""
        prompts = workloads.load_suite(plan.suite, plan.prompt_file, plan.limit)
        found = saving.load(plan.output) if plan.resume and plan.output and plan.output.exists() else None
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        loaded = accel.load(plan.model, device=plan.device, dtype=plan.dtype)
        machine = environment.describe(loaded.model.device)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(plan, prompts, loaded.model, loaded.tokenizer, machine, found, date)

    def settings(self, names: Sequence[str], **own: Any) -> dict[str, Any]:
        """What must be the same for two measurements to stand in one table: no two versions or machines mix."""
        return {
            "model": self.plan.model,
            "artifacts": list(self.plan.artifacts),
            "suite": self.plan.suite,
            "prompts_sha256": workloads.digest(self.prompts),
            "arms": list(names),
            **asdict(self.plan.settings),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **{key: self.machine[key] for key in ("device", "threads", "cpu", "accel", "torch", "transformers")},
            **own,
        }

    def frame(self, settings: dict[str, Any], contests: Sequence[Runner], complete: bool) -> dict[str, Any]:
        """The arguments of a document that do not depend on what was measured."""
        notes = list(dict.fromkeys(note for contest in contests for note in contest.notes))
        return {
            "settings": settings,
            "environment": self.machine,
            "command": self.plan.command,
            "date": self.date,
            "complete": complete,
            "notes": notes,
        }


def carry_out(plan: Plan, progress: Progress = lambda done, total, prompt, arm: None) -> dict[str, Any]:
    """Measure as ``plan`` says; returns the finished document, and keeps ``plan.output`` up to date meanwhile."""
    ground = Ground.prepare(plan)
    where = {"device": plan.device, "dtype": plan.dtype}
    draft = arms.find_draft(plan.artifacts[0], ground.model, **where) if plan.artifacts else None
    seed = {"seed": plan.settings.seed} if plan.settings.temperature > 0 else {}
    chosen = arms.choose(arms.all_arms(draft, **seed), plan.arms)
    contest = Runner(ground.model, ground.tokenizer, chosen, plan.settings)
    if draft and draft.reason:
        contest.notes.append(f"{draft.reason}, so transformers-assisted uses prompt lookup")
    settings = ground.settings([arm.name for arm in chosen])

    def summarise(records: Sequence[Record], complete: bool) -> dict[str, Any]:
        return summary.document(
            records,
            settings["arms"],
            contest.reference,
            keep_records=plan.save_detailed,
            **ground.frame(settings, [contest], complete),
        )

    return conduct(ground, [contest], settings, summarise, progress)


def conduct(
    ground: Ground, contests: Sequence[Runner], settings: dict[str, Any], summarise: Summarise, progress: Progress
) -> dict[str, Any]:
    """Run every prompt in every contest, one prompt after the other, and save after each.

    Contests differ in temperature, which tells their records apart.
    """
    plan = ground.plan
    records = saving.resume(ground.found, settings, plan.output) if ground.found and plan.output else []

    def save(complete: bool) -> dict[str, Any]:
        result = summarise(records, complete)
        if plan.output:
            saving.write(plan.output, saving.dump(result))
        return result

    count = _counted(progress, ground.prompts, records, contests)
    for contest in contests:
        contest.broken = {record.arm: record.error for record in _of(contest, records) if record.error}
        contest.progress = count
    for of_prompt in _in_turn(contests, ground.prompts, records):
        records += of_prompt
        save(complete=False)
    return save(complete=True)


def _of(contest: Runner, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.temperature == contest.settings.temperature]


def _in_turn(
    contests: Sequence[Runner], prompts: Sequence[Prompt], records: Sequence[Record]
) -> Iterator[list[Record]]:
    """A prompt's records from each contest in turn."""
    streams = [contest.measure(prompts, {record.prompt for record in _of(contest, records)}) for contest in contests]
    while streams:
        for stream in list(streams):
            of_prompt = next(stream, None)
            if of_prompt is None:
                streams.remove(stream)
            else:
                yield of_prompt


def _counted(
    progress: Progress, prompts: list[Prompt], records: Sequence[Record], contests: Sequence[Runner]
) -> Callable[[Prompt, str], None]:
    """Count runs for ``progress``; those of a resumed file are done already and are not in the total."""
    total = 0
    for contest in contests:
        measured = {record.prompt for record in _of(contest, records)}
        turns = sum(min(contest.settings.turns, len(prompt.turns)) for prompt in prompts if prompt.id not in measured)
        total += turns * contest.settings.repeat * len(contest.arms)
    done = 0

    def count(prompt: Prompt, arm: str) -> None:
        nonlocal done
        progress(done, total, prompt, arm)
        done += 1

    return count
