"""A teacher works on tasks; its successes become demonstrations (arXiv 2512.02543, phase 1).

Each finished task is a line of a file in the work folder, so that a run which was killed goes on behind it. Knows
tasks, answerers and that file. Does not know what the demonstrations are for.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel.artifacts import json_digest
from accel.errors import AccelError, ArtifactError, OptionError, first_line
from accel.methods.cascade.answerer import Answerer, Sampling
from accel.methods.cascade.prices import Usage
from accel.methods.cascade.prompt import PLAIN, Layout
from accel.methods.cascade.store import Demonstration, Situation
from accel.methods.cascade.tasks import Environment, Trajectory, play

LOG = "episodes.jsonl"
KEEP = ("success", "all")


@dataclass(frozen=True)
class Recipe:
    """``tries``: of a task until it succeeds. ``keep``: successful trajectories, or all, each with its outcome.
    ``workers``: tasks worked on at once. ``marker`` and ``history``: see ``tasks.play``."""

    tries: int = 1
    keep: str = "success"
    temperature: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    marker: str = ""
    history: int = 0
    seed: int = 0
    seconds: float = 120.0
    workers: int = 1
    layout: Layout = PLAIN

    def __post_init__(self) -> None:
        for name, least in (("tries", 1), ("workers", 1), ("history", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"{name}={value!r}: must be a whole number ≥ {least}")
        if self.keep not in KEEP:
            raise OptionError(f"keep={self.keep!r}: choose from {', '.join(KEEP)}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise OptionError(f"seconds={self.seconds!r}: the time limit of an answer is a number > 0")
        if self.tries > 1 and self.temperature == 0:
            raise OptionError(
                f"tries={self.tries} with temperature=0: every try would be the same; take a temperature above 0"
            )
        self.sampling(0)

    def sampling(self, number: int) -> Sampling:
        return Sampling(self.temperature, self.max_tokens, None, self.stop, self.seed + number)

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before: not how fast, nor how long it may take."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "seconds")}


@dataclass(frozen=True)
class Collected:
    """One task's outcome, and what its tries took. ``cost`` None: the price or the usage is unknown."""

    task: int
    success: bool
    tries: int
    steps: int
    usage: Usage | None
    seconds: float
    cost: float | None
    demonstration: Demonstration | None

    def to_json(self) -> str:
        raw = {**vars(self), "usage": None if self.usage is None else vars(self.usage)}
        shown = None if self.demonstration is None else json.loads(self.demonstration.to_json())
        return json.dumps(raw | {"demonstration": shown}, ensure_ascii=False)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Collected:
        usage, shown = raw["usage"], raw["demonstration"]
        return cls(
            **{
                **raw,
                "usage": None if usage is None else Usage(**usage),
                "demonstration": None if shown is None else Demonstration.from_dict(shown),
            }
        )


def collect(
    environment: Environment,
    tasks: Sequence[Any],
    teacher: Answerer,
    recipe: Recipe,
    work: Path,
    *,
    name: str = "tasks",
    progress: Callable[[str], None] = lambda message: None,
) -> list[Collected]:
    """Every task once, in order; those that ``work`` has already are not asked again.

    ``name``: of the tasks, for demonstrations to say which one they come from. A teacher that does not answer ends
    the run with its error: what was finished is kept.
    """
    identity = {
        "teacher": teacher.name,
        "tasks": json_digest([str(task) for task in tasks]),
        "name": name,
        "system": environment.SYSTEM,
        "recipe": recipe.identity(),
    }
    log = _Log(work, identity)
    try:
        todo = [number for number in range(len(tasks)) if number not in log.finished]
        stopped = threading.Event()

        def one(number: int) -> None:
            if stopped.is_set():
                return
            try:
                log.add(_work_on(environment, tasks[number], number, teacher, recipe, f"{name}/{number}"))
            except BaseException:
                # before the pool hands out the next one: a teacher that is down is not to be asked for each
                stopped.set()
                raise
            progress(_told(log.finished.values(), len(tasks)))

        progress(_told(log.finished.values(), len(tasks)))
        with ThreadPoolExecutor(recipe.workers) as pool:
            futures = [pool.submit(one, number) for number in todo]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for each in done:
                    each.result()
            finally:
                stopped.set()
    finally:
        log.close()
    return [log.finished[number] for number in range(len(tasks))]


def _work_on(
    environment: Environment, task: Any, number: int, teacher: Answerer, recipe: Recipe, name: str
) -> Collected:
    usages: list[Usage | None] = []
    seconds, costs = 0.0, list[float | None]()
    kept: Trajectory | None = None
    tries = 0

    def ask(messages: list[dict[str, str]], situation: Situation) -> str:
        nonlocal seconds
        settings = recipe.sampling(number * recipe.tries + tries)
        reply = teacher.sample(messages, 1, settings, seconds=recipe.seconds)
        usages.append(reply.usage)
        seconds += reply.seconds
        costs.append(None if teacher.price is None else teacher.price.dollars(reply.usage, reply.seconds))
        if not reply.samples:
            raise AccelError(f"{teacher.name}: no samples")
        return reply.samples[0].text

    while tries < recipe.tries and not (kept and kept.success):
        kept = play(
            environment.Episode(task),
            task.goal,
            ask,
            system=environment.SYSTEM,
            layout=recipe.layout,
            marker=recipe.marker,
            history=recipe.history,
            name=name,
        )
        tries += 1
    assert kept is not None
    wanted = bool(kept.steps) and (kept.success or recipe.keep == "all")
    return Collected(
        number,
        kept.success,
        tries,
        len(kept.steps),
        None if None in usages else sum((each for each in usages if each is not None), Usage()),
        seconds,
        None if None in costs else math.fsum(each for each in costs if each is not None),
        kept.demonstration(episode=name, source=f"teacher:{teacher.name}") if wanted else None,
    )


def measured(found: Sequence[Collected]) -> dict[str, Any]:
    """What collecting took and brought, for the manifest."""
    costs = [each.cost for each in found]
    total = None if None in costs else math.fsum(each for each in costs if each is not None)
    usages = [each.usage for each in found if each.usage is not None]
    return {
        "tasks": len(found),
        "successes": sum(each.success for each in found),
        "success_rate": sum(each.success for each in found) / len(found),
        "tries": sum(each.tries for each in found),
        "cost": total,
        "cost_a_task": None if total is None else total / len(found),
        "seconds": math.fsum(each.seconds for each in found),
        **vars(sum(usages, Usage())),
    }


def _told(found: Iterable[Collected], total: int) -> str:
    done = list(found)
    return f"{len(done)}/{total} tasks · {sum(each.success for each in done)} succeeded"


class _Log:
    """Finished tasks, a line each, behind a first line that says whose run it is."""

    def __init__(self, work: Path, identity: dict[str, Any]) -> None:
        self.finished: dict[int, Collected] = {}
        self._lock = threading.Lock()
        path = work / LOG
        head = json.dumps({"run": json_digest(identity), **identity}, ensure_ascii=False)
        try:
            work.mkdir(parents=True, exist_ok=True)
            whole = self._read(path, head)
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - open as long as the run
            # a line that a kill cut off is written again
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._write(head)
        except OSError as error:
            raise AccelError(f"cannot write {path}: {error.strerror or error}") from error

    def add(self, found: Collected) -> None:
        with self._lock:
            self._write(found.to_json())
            self.finished[found.task] = found

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, path: Path, head: str) -> int:
        """Take in what is there; returns the bytes up to the end of its last whole line."""
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        if lines and lines[0] != head.encode():
            raise ArtifactError(
                f"{path} is of another run (teacher, tasks or settings differ): choose another folder, or remove it"
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                found = Collected.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError, AccelError) as error:
                raise ArtifactError(f"{path}:{number}: no finished task: {first_line(error)}") from error
            self.finished[found.task] = found
        return whole
