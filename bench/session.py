"""One benchmark from a plan to its document: load, run every prompt, save after each. The CLI's only entry."""

from __future__ import annotations

from collections.abc import Callable
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
        if len(self.artifacts) > 1:
            raise OptionError(
                f"{len(self.artifacts)} artifacts given: the benchmark compares one draft model at a time"
            )
        arms.check(self.arms, bool(self.artifacts))


def carry_out(plan: Plan, progress: Progress = lambda done, total, prompt, arm: None) -> dict[str, Any]:
    """Measure as ``plan`` says; returns the finished document, and keeps ``plan.output`` up to date meanwhile."""
    prompts = workloads.load_suite(plan.suite, plan.prompt_file, plan.limit)
    # a file that is no results file is told before minutes are spent on loading
    found = saving.load(plan.output) if plan.resume and plan.output and plan.output.exists() else None
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    where = {"device": plan.device, "dtype": plan.dtype}
    loaded = accel.load(plan.model, **where)
    draft = arms.find_draft(plan.artifacts[0], loaded.model, **where) if plan.artifacts else None
    seed = {"seed": plan.settings.seed} if plan.settings.temperature > 0 else {}
    contest = Runner(
        loaded.model, loaded.tokenizer, arms.choose(arms.all_arms(draft, **seed), plan.arms), plan.settings
    )
    machine = environment.describe(loaded.model.device)
    settings = _settings(plan, prompts, contest, machine)
    records = saving.resume(found, settings, plan.output) if found and plan.output else []
    contest.broken = {record.arm: record.error for record in records if record.error}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if draft and draft.reason:
        contest.notes.append(f"{draft.reason}, so transformers-assisted uses prompt lookup")

    def document(complete: bool) -> dict[str, Any]:
        return summary.document(
            records,
            settings["arms"],
            contest.reference,
            settings=settings,
            environment=machine,
            command=plan.command,
            date=date,
            complete=complete,
            notes=contest.notes,
            keep_records=plan.save_detailed,
        )

    def save(complete: bool) -> dict[str, Any]:
        result = document(complete)
        if plan.output:
            saving.write(plan.output, saving.dump(result))
        return result

    contest.progress = _counted(progress, prompts, records, contest)
    for of_prompt in contest.measure(prompts, skip={record.prompt for record in records}):
        records += of_prompt
        save(complete=False)
    return save(complete=True)


def _settings(plan: Plan, prompts: list[Prompt], contest: Runner, machine: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for two measurements to stand in one table: two versions or machines must not be mixed."""
    return {
        "model": plan.model,
        "artifacts": list(plan.artifacts),
        "suite": plan.suite,
        "prompts_sha256": workloads.digest(prompts),
        "arms": [arm.name for arm in contest.arms],
        **asdict(plan.settings),
        "dtype": str(contest.model.dtype).removeprefix("torch."),
        **{key: machine[key] for key in ("device", "threads", "cpu", "accel", "torch", "transformers")},
    }


def _counted(
    progress: Progress, prompts: list[Prompt], records: list[Record], contest: Runner
) -> Callable[[Prompt, str], None]:
    """Count runs for ``progress``; those of a resumed file are done already and are not in the total."""
    measured = {record.prompt for record in records}
    turns = sum(min(contest.settings.turns, len(prompt.turns)) for prompt in prompts if prompt.id not in measured)
    total = turns * contest.settings.repeat * len(contest.arms)
    done = 0

    def count(prompt: Prompt, arm: str) -> None:
        nonlocal done
        progress(done, total, prompt, arm)
        done += 1

    return count
