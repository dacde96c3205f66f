"""A plan of load on one server, or on several in turns, and the document that it ends in.

One server in one round gives the flat document of `vllm bench serve`. Otherwise every round asks each server the same
prompts, beginning with another server each time, and speeds are compared within a round alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from accel.bench import environment, saving, workloads
from accel.bench.serving import figures, scrape
from accel.bench.serving.client import Ask, Server
from accel.bench.serving.load import arrivals, check_rate, drive
from accel.bench.serving.stream import Outcome
from accel.errors import OptionError

TOOL = "accel bench serve"
# vLLM's names of what is spoken
BACKENDS = {"chat": "openai-chat", "completions": "openai"}
COMPARED = (
    "output_throughput",
    "request_throughput",
    "median_ttft_ms",
    "median_ttft_text_ms",
    "median_tpot_ms",
    "p99_itl_ms",
    "median_e2el_ms",
)
Told = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A server to be asked; ``model`` None is the first that it names."""

    name: str
    url: str
    model: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked of whom, and how fast. ``num_prompts`` None: every prompt once.

    ``warmup``: requests to each server before the clock, of prompts that are not measured. ``key``: for all servers.
    """

    targets: Sequence[Target]
    ask: Ask
    prompts: Path | None = None
    num_prompts: int | None = None
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    repeat: int = 1
    warmup: int = 0
    ready_timeout: float = 600.0
    goodput: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    save_detailed: bool = False
    key: str | None = None
    output: Path | None = None
    append: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        check_rate(self.request_rate, self.burstiness, self.max_concurrency)
        names = [each.name for each in self.targets]
        if not names:
            raise OptionError("no server to ask: give one with --url URL")
        if len(set(names)) < len(names):
            raise OptionError(
                f"--url: two servers of one name among {', '.join(names)}; name them, as in ours=http://…"
            )
        for name, least in (("num_prompts", 1), ("repeat", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name}={value}: must be at least {least}")
        if not self.ready_timeout > 0:
            raise OptionError(f"ready_timeout={self.ready_timeout:g}: must be more than 0 seconds")
        if self.append and self.output is None:
            raise OptionError("--append-result needs --output: the file to append to")


def carry_out(plan: Plan, told: Told) -> dict[str, Any]:
    """Ask, and save the document, after every round where there are several."""
    return asyncio.run(_carried_out(plan, told))


async def _carried_out(plan: Plan, told: Told) -> dict[str, Any]:
    prompts = [each.turns[0] for each in workloads.load_jsonl(plan.prompts or workloads.EMBEDDED)]
    date = time.strftime("%Y%m%d-%H%M%S")
    single = len(plan.targets) == plan.repeat == 1
    async with AsyncExitStack() as stack:
        servers = []
        for target in plan.targets:
            server = Server(target.name, target.url, plan.ask, model=target.model, key=plan.key)
            stack.push_async_callback(server.close)
            servers.append(server)
        notes = _prompt_notes(plan, len(prompts))
        for server in servers:
            told(f"{server.name}: waiting for {server.base}")
            notes += await server.connect(plan.ready_timeout)
        for server in servers:
            notes += await _warm_up(server, plan, told)
        rounds: list[dict[str, Any]] = []
        for number in range(plan.repeat):
            asked = chosen(prompts, plan, number)
            turn = number % len(servers)
            for server in servers[turn:] + servers[:turn]:
                about = f"{server.name}" if single else f"round {number + 1}/{plan.repeat} · {server.name}"
                rounds.append({"round": number, **await _run(server, plan, asked, number, date, about, told)})
            if not single and number + 1 < plan.repeat:
                _save(plan, compared(plan, rounds, notes, date, complete=False), done=False)
    notes += _early_notes(rounds)
    if single:
        del rounds[0]["round"]
        document = rounds[0] | _about(plan, notes)
    else:
        document = compared(plan, rounds, notes, date, complete=True)
    _save(plan, document, done=True)
    return document


def chosen(prompts: Sequence[str], plan: Plan, number: int) -> list[str]:
    """The prompts of a round: they go on where the round before ended, and begin again when the file is through."""
    count = plan.num_prompts or len(prompts)
    return [prompts[(number * count + index) % len(prompts)] for index in range(count)]


def _prompt_notes(plan: Plan, held: int) -> list[str]:
    asked = (plan.num_prompts or held) * plan.repeat
    if asked <= held:
        return []
    return [f"{asked} requests a server from {held} prompts: they come again, and a prefix cache may know them"]


def _early_notes(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who opens with a chunk that has no text long before the first token: its TTFT promises more than it gives."""
    late = {each["label"]: None for each in rounds if each["median_ttft_text_ms"] > 1.05 * each["median_ttft_ms"] + 1}
    return [f"{name}: its first chunk has no text, and TTFT counts it: see ttft_text" for name in late]


async def _warm_up(server: Server, plan: Plan, told: Told) -> list[str]:
    if not plan.warmup:
        return []
    told(f"{server.name}: {plan.warmup} requests to warm up")
    prompts = [f"Count from {number + 1} upwards, one number a line." for number in range(plan.warmup)]
    outcomes, _ = await drive(server.ask, prompts, [0.0] * plan.warmup, plan.max_concurrency)
    failed = figures.errors(outcomes)
    return [f"{server.name}: warm-up: {each['count']} failed: {each['error']}" for each in failed]


async def _run(
    server: Server, plan: Plan, prompts: Sequence[str], number: int, date: str, about: str, told: Told
) -> dict[str, Any]:
    """One server under one round's load: vLLM's flat keys, and a few of ours."""
    times = arrivals(len(prompts), plan.request_rate, plan.burstiness, plan.seed + number)
    done, failed = 0, 0

    def heard(outcome: Outcome) -> None:
        nonlocal done, failed
        done, failed = done + 1, failed + (outcome.error is not None)
        told(f"{about} · {done}/{len(prompts)} answered" + (f" · {failed} failed" if failed else ""))

    told(f"{about} · 0/{len(prompts)} answered")
    before = scrape.read(await server.metrics())
    outcomes, duration = await drive(server.ask, prompts, times, plan.max_concurrency, heard)
    after = scrape.read(await server.metrics())
    return {
        "date": date,
        "backend": BACKENDS[plan.ask.endpoint],
        "label": server.name,
        "model_id": server.model,
        # tokens are the server's own count: none are made here
        "tokenizer_id": None,
        "num_prompts": len(prompts),
        **plan.metadata,
        "request_rate": _finite(plan.request_rate),
        "burstiness": _finite(plan.burstiness),
        "max_concurrency": plan.max_concurrency,
        **figures.figures(outcomes, duration, plan.goodput),
        **scrape.acceptance(before, after),
        "counted_chunks": any(each.counted for each in outcomes),
        "failures": figures.errors(outcomes),
        **(figures.detailed(outcomes) if plan.save_detailed else {}),
    }


def _finite(value: float) -> float | str:
    """JSON has no infinity; vLLM writes the word."""
    return "inf" if value == float("inf") else value


def _about(plan: Plan, notes: Sequence[str]) -> dict[str, Any]:
    ask = plan.ask
    return {
        "tool": TOOL,
        "command": plan.command,
        "settings": {
            "endpoint": ask.endpoint,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "ignore_eos": ask.ignore_eos,
            "extra_body": dict(ask.extra),
            "prompts": plan.prompts.name if plan.prompts else "embedded",
            "seed": plan.seed,
            "warmup": plan.warmup,
            "goodput": dict(plan.goodput),
        },
        "environment": environment.describe(),
        "notes": list(notes),
    }


def compared(
    plan: Plan, rounds: Sequence[dict[str, Any]], notes: Sequence[str], date: str, *, complete: bool
) -> dict[str, Any]:
    """The document of several servers or rounds."""
    names = [each.name for each in plan.targets]
    first = names[0]
    return {
        "date": date,
        "complete": complete,
        **_about(plan, notes),
        "repeat": plan.repeat,
        "servers": {name: _summary([each for each in rounds if each["label"] == name]) for name in names},
        "ratios": {name: ratios(rounds, first, name) for name in names[1:]},
        "rounds": list(rounds),
    }


def _summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one server: sums, and the median and range over its rounds of what is compared."""
    found: dict[str, Any] = {
        "model_id": rounds[0]["model_id"],
        "completed": sum(each["completed"] for each in rounds),
        "failed": sum(each["failed"] for each in rounds),
        "total_output_tokens": sum(each["total_output_tokens"] for each in rounds),
    }
    for key in (*COMPARED, "spec_decode_acceptance_length"):
        values = [each[key] for each in rounds if key in each]
        if values:
            found[key] = {"median": median(values), "min": min(values), "max": max(values)}
    return found


def ratios(rounds: Sequence[Mapping[str, Any]], first: str, other: str) -> dict[str, Any]:
    """``first``'s output tokens a second over ``other``'s, round by round, and their median and range.

    A round in which a request failed has none: a server gains nothing by what it did not answer.
    """
    by_round: list[float | None] = []
    for number in sorted({each["round"] for each in rounds}):
        pair = {each["label"]: each for each in rounds if each["round"] == number}
        if first not in pair or other not in pair:
            continue
        mine, theirs = pair[first], pair[other]
        whole = not mine["failed"] and not theirs["failed"] and theirs["output_throughput"] > 0
        by_round.append(mine["output_throughput"] / theirs["output_throughput"] if whole else None)
    values = [each for each in by_round if each is not None]
    return {
        "of": first,
        "over": other,
        "key": "output_throughput",
        "rounds": by_round,
        "median": median(values) if values else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
    }


def _save(plan: Plan, document: Mapping[str, Any], *, done: bool) -> None:
    if plan.output is None:
        return
    text = saving.dump(document)
    if not plan.append:
        saving.write(plan.output, text)
    elif done:
        # one document a line
        held = plan.output.read_text(encoding="utf-8") if plan.output.exists() else ""
        saving.write(plan.output, held + ("" if held.endswith("\n") or not held else "\n") + text)
