"""The suite `lawcat`: what a conversion to linear attention keeps of a softmax model, and from which length it pays.

One model, without and with the conversion, taken in turn: numbers found again in long texts, the cross entropy of a
text by position, seconds to read a prompt, tokens/s behind it, and bytes a request holds. Lengths beyond the model's
positions are measured on both all the same, and marked: that softmax fails there is part of the answer. Measures only;
lawcat_report shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

import accel
from accel.artifacts import open_artifact, resolve
from accel.bench import environment, passkey, saving, summary
from accel.bench.arms import Arm, attached
from accel.bench.measure import generate_kwargs, left_padded, rotated
from accel.bench.metrics import paired, wilson
from accel.bench.workloads import digest, encode, load_answered, sample
from accel.distill.files import read_text
from accel.distill.forward import Scorer
from accel.errors import OptionError
from accel.methods.lawcat.artifact import Lawcat

Told = Callable[[str], None]

SUITE = "lawcat"
SOFTMAX, LINEAR = "softmax", "linear"
ARMS = (SOFTMAX, LINEAR)
# lengths where none are asked for: so many times what the conversion was trained with
TIMES = (1, 2, 4, 8, 16)
CORPUS = passkey.DATA / "handbook.txt"
# prompts that are answered together
ROWS = 8
PROMPTS = "prompts"
# the bars: of the numbers, found at 8 times the trained length; of the time for twice the length
KEPT, AT_TIMES, GROWTH = 0.9, 8, 2.2


@dataclass(frozen=True)
class Plan:
    """``questions``: JSON lines with question and answer, None for generated tasks; ``corpus``: a text."""

    model: str
    artifact: str
    lengths: tuple[int, ...] | None = None
    questions: Path | None = None
    corpus: Path = CORPUS
    # tasks of each kind and length
    limit: int = 8
    digits: int = passkey.DIGITS
    # tokens decoded by the clock, and of a reply to ``questions``
    max_new_tokens: int = 32
    concurrency: tuple[int, ...] = (1, 4)
    repeat: int = 3
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.limit < 1 or self.repeat < 1 or not self.concurrency or min(self.concurrency) < 1:
            raise OptionError(
                f"limit={self.limit}, repeat={self.repeat}, concurrency={self.concurrency}: all must be 1 or more"
            )
        if self.max_new_tokens < 2:
            raise OptionError(f"max_new_tokens={self.max_new_tokens}: must be 2 or more")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise OptionError(f"lengths={self.lengths}: whole numbers of tokens, 1 or more")


@dataclass(frozen=True)
class Asked:
    """A question as token ids, the row of the table that it counts in, and what is right."""

    ids: Sequence[int]
    length: int
    right: Callable[[str], bool]
    max_new_tokens: int


def carry_out(plan: Plan, told: Told = lambda message: None) -> dict[str, Any]:
    """Measure as ``plan`` says and return the document, which is also written to ``plan.output``."""
    text = read_text(plan.corpus, "the text")
    artifact = open_artifact(resolve(plan.artifact))
    told("loading the model …")
    loaded = accel.load(plan.model, device=plan.device, dtype=plan.dtype, method="plain")
    model, tokenizer = accel.detach(loaded.model), loaded.tokenizer
    if tokenizer is None:
        raise OptionError(f"{plan.model} brings no tokenizer: texts cannot be read without one")
    lawcat = Lawcat.load(artifact, model, tokenizer)
    trained = lawcat.measured.get("training_length")
    lengths = _lengths(plan, trained)
    positions = getattr(model.config, "max_position_embeddings", None)
    asked = _asked(plan, tokenizer, lengths)
    arms = [attached(SOFTMAX, method="plain"), attached(LINEAR, lawcat, method="plain")]
    with _room_for(model, max(lengths) + plan.max_new_tokens):
        retrieval = {name: _retrieval(name, some, arms, model, tokenizer, told) for name, some in asked.items()}
        told("cross entropy …")
        perplexity = _perplexity(text, lengths, arms, model, tokenizer)
        clock = _Clock(plan, lengths, arms, model, tokenizer, told)
        runs = {size: clock.runs(size) for size in sorted({1, *plan.concurrency})}
    settings = {
        "suite": SUITE,
        "model": plan.model,
        "artifact": plan.artifact,
        "spec": lawcat.spec.as_dict(),
        "converted": len(lawcat.spec.layers),
        "layers": model.config.num_hidden_layers,
        "delta_bytes": lawcat.nbytes(),
        "training_length": trained,
        "positions": positions,
        "lengths": list(lengths),
        "tasks": plan.limit,
        "digits": None if plan.questions else plan.digits,
        "questions_sha256": digest(load_answered(plan.questions)) if plan.questions else None,
        "corpus": plan.corpus.name,
        "max_new_tokens": plan.max_new_tokens,
        "concurrency": sorted(runs),
        "repeat": plan.repeat,
        "seed": plan.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    frame = summary.frame(
        settings=settings,
        environment=environment.describe(model.device),
        command=plan.command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=True,
    )
    document = frame | {
        "reference": SOFTMAX,
        "retrieval": retrieval,
        "perplexity": perplexity,
        "prefill": [_prefill(length, runs[1][length]) for length in lengths],
        "growth": [_growth(a, b, runs[1]) for a, b in pairwise(lengths)],
        "decode": {
            str(size): [_decode(length, size, plan.max_new_tokens, each[length]) for length in lengths]
            for size, each in runs.items()
        },
        "state": [{"length": n, **{name: runs[1][n][name]["bytes"][-1] for name in ARMS}} for n in lengths],
    }
    document["break_even"] = {
        "prefill": break_even(document["prefill"]),
        "decode": {size: break_even(rows) for size, rows in document["decode"].items()},
    }
    document["verdicts"] = _verdicts(document)
    if plan.output:
        saving.write(plan.output, saving.dump(document))
    return document


def break_even(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The smallest length from which on the linear model is the faster one; None where it is not at the longest."""
    found = None
    for row in reversed(rows):
        if row["speedup"][0] <= 1:
            break
        found = row["length"]
    return found


def _lengths(plan: Plan, trained: int | None) -> tuple[int, ...]:
    if plan.lengths is not None:
        return tuple(sorted(set(plan.lengths)))
    if trained is None:
        raise OptionError(f"{plan.artifact} does not say which length it was trained with: give --lengths, as 512,1024")
    return tuple(trained * times for times in TIMES)


@contextmanager
def _room_for(model: Any, longest: int) -> Iterator[None]:
    """Let prompts in that are longer than the model's positions: rotations go on, only what comes of it is open."""
    config = model.config
    before = getattr(config, "max_position_embeddings", None)
    if before is None or before >= longest:
        yield
        return
    config.max_position_embeddings = longest
    try:
        yield
    finally:
        config.max_position_embeddings = before


def _asked(plan: Plan, tokenizer: Any, lengths: Sequence[int]) -> dict[str, list[Asked]]:
    """The questions of each kind, shortest first."""
    if plan.questions is not None:
        return {PROMPTS: _own(plan, plan.questions, tokenizer, lengths)}
    found: dict[str, list[Asked]] = {}
    for name, make in passkey.TASKS.items():
        chance = random.Random(f"{name} {plan.seed}")
        found[name] = []
        for length in lengths:
            for number in range(plan.limit):
                # spread over all depths
                depth = (number + chance.random()) / plan.limit
                task = make(chance, length, tokenizer, digits=plan.digits, depth=depth)
                size = len(tokenizer(f" {task.answer}", add_special_tokens=False)["input_ids"])
                # one more: a number that goes on is another number
                found[name].append(Asked(task.ids, length, task.right, size + 1))
    return found


def _own(plan: Plan, file: Path, tokenizer: Any, lengths: Sequence[int]) -> list[Asked]:
    """The user's questions; each counts at the smallest length that it fits into."""
    found = []
    for prompt in sample(load_answered(file), plan.limit):
        ids = encode(tokenizer, prompt.turns[:1])[0].tolist()
        if len(ids) > max(lengths):
            raise OptionError(
                f"{file}: question {prompt.id} has {len(ids)} tokens and the longest length is {max(lengths)}: give "
                "--lengths that reach so far"
            )
        answer = str(prompt.answer).casefold()

        def right(said: str, answer: str = answer) -> bool:
            return answer in said.casefold()

        found.append(Asked(ids, next(n for n in lengths if n >= len(ids)), right, plan.max_new_tokens))
    return sorted(found, key=lambda each: each.length)


def _retrieval(
    name: str, asked: Sequence[Asked], arms: Sequence[Arm], model: Any, tokenizer: Any, told: Told
) -> list[dict[str, Any]]:
    """A row a length: the share of right answers of both."""
    rows = []
    for number, length in enumerate(dict.fromkeys(each.length for each in asked)):
        some = [each for each in asked if each.length == length]
        row: dict[str, Any] = {"length": length, "tasks": len(some)}
        for arm in rotated(arms, number):
            told(f"{name}, {length} tokens: {arm.name} …")
            with arm.prepare(model):
                marks = [
                    mark for at in range(0, len(some), ROWS) for mark in _marks(some[at : at + ROWS], model, tokenizer)
                ]
            low, high = wilson(sum(marks), len(marks))
            row[arm.name] = {"accuracy": sum(marks) / len(marks), "low": low, "high": high, "right": marks}
        rows.append(row)
    return rows


def _marks(some: Sequence[Asked], model: Any, tokenizer: Any) -> list[bool]:
    batch = left_padded([each.ids for each in some], model.device)
    kwargs = generate_kwargs(tokenizer, max(each.max_new_tokens for each in some), 0.0)
    new = model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
    said = [
        tokenizer.decode(ids[: each.max_new_tokens], skip_special_tokens=True)
        for ids, each in zip(new, some, strict=True)
    ]
    return [each.right(text) for each, text in zip(some, said, strict=True)]


def _perplexity(
    text: str, lengths: Sequence[int], arms: Sequence[Arm], model: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """Mean cross entropy by position: the text in rows of the longest length, each from its beginning."""
    ids = tokenizer(text)["input_ids"]
    rows = [ids[at : at + max(lengths)] for at in range(0, len(ids), max(lengths))]
    edges = [0, *lengths]
    sums = {name: [0.0] * len(lengths) for name in ARMS}
    counts = [0] * len(lengths)
    for number, row in enumerate(each for each in rows if len(each) > 1):
        for arm in rotated(arms, number):
            with arm.prepare(model):
                losses = _losses(model, row)
            for place, (start, end) in enumerate(pairwise(edges)):
                # loss i is of the token behind position i
                sums[arm.name][place] += float(losses[start:end].double().sum())
        for place, (start, end) in enumerate(pairwise(edges)):
            counts[place] += len(range(start, min(end, len(row) - 1)))
    return [
        {"from": start, "to": end, "tokens": count, **{name: sums[name][place] / count for name in ARMS}}
        for place, ((start, end), count) in enumerate(zip(pairwise(edges), counts, strict=True))
        if count
    ]


def _losses(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """-ln p of every token but the first, [T - 1]."""
    tokens = torch.tensor([ids], device=model.device)
    labels = tokens[0, 1:]
    pieces = Scorer(model).pieces(tokens, torch.arange(len(ids) - 1, device=model.device))
    found, at = [], 0
    for logits in pieces:
        found.append(F.cross_entropy(logits, labels[at : at + len(logits)], reduction="none"))
        at += len(logits)
    return torch.cat(found).cpu()


class _Clock:
    """Prompts of every length, read and continued by both, side by side."""

    def __init__(
        self, plan: Plan, lengths: Sequence[int], arms: Sequence[Arm], model: Any, tokenizer: Any, told: Told
    ) -> None:
        self.plan, self.lengths, self.arms, self.model, self.told = plan, lengths, arms, model, told
        self.tokenizer = tokenizer
        self.kwargs = generate_kwargs(tokenizer, plan.max_new_tokens, 0.0) | {"min_new_tokens": plan.max_new_tokens}

    def runs(self, size: int) -> dict[int, dict[str, dict[str, list[float]]]]:
        """``size`` requests at once. Length → arm → seconds of reading and of decoding, and bytes, a repetition."""
        found: dict[int, dict[str, dict[str, list[float]]]] = {
            length: {name: {"prefill": [], "decode": [], "bytes": []} for name in ARMS} for length in self.lengths
        }
        # the first round warms caches up
        for number in range(-1, self.plan.repeat):
            for place, length in enumerate(self.lengths if number >= 0 else self.lengths[:1]):
                self.told(f"timing: {size} at once, {length} tokens, {max(number, 0) + 1} of {self.plan.repeat} …")
                batch = left_padded([self._text(length, row) for row in range(size)], self.model.device)
                for arm in rotated(self.arms, number + place):
                    with arm.prepare(self.model):
                        self.model.generate(**batch, **self.kwargs)
                        stats = arm.stats(self.model)
                    if number >= 0:
                        row = found[length][arm.name]
                        row["prefill"].append(stats.seconds["prefill"])
                        row["decode"].append(stats.seconds["decode"])
                        row["bytes"].append(stats.state_bytes)
        return found

    def _text(self, length: int, row: int) -> Sequence[int]:
        """No two alike: rows with the same prompt would share its keys and values."""
        chance = random.Random(f"clock {self.plan.seed} {row}")
        return passkey.filled(chance, length, self.tokenizer)


def _prefill(length: int, runs: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"length": length}
    for name in ARMS:
        seconds = runs[name]["prefill"]
        row[name] = {"seconds": median(seconds), "tokens_per_second": length / median(seconds), "runs": seconds}
    return row | {"speedup": paired(runs[SOFTMAX]["prefill"], runs[LINEAR]["prefill"])}


def _decode(length: int, size: int, tokens: int, runs: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"length": length}
    for name in ARMS:
        # the first token comes with the prompt
        row[name] = {"tokens_per_second": size * (tokens - 1) / median(runs[name]["decode"])}
    return row | {"speedup": paired(runs[SOFTMAX]["decode"], runs[LINEAR]["decode"])}


def _growth(short: int, long: int, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as long the longer prompt takes: median, least and most over repetitions."""
    times = {name: paired(runs[long][name]["prefill"], runs[short][name]["prefill"]) for name in ARMS}
    return {"from": short, "to": long, **times}


def _verdicts(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The bars and what was measured; ``met`` is None where this run has no such figure."""
    found: dict[str, dict[str, Any]] = {}
    trained = document["settings"]["training_length"]
    for task, rows in document["retrieval"].items():
        if task in passkey.TASKS:
            far = next((row for row in rows if trained and row["length"] >= AT_TIMES * trained), None)
            value = None if far is None else far[LINEAR]["accuracy"]
            met = None if value is None else value >= KEPT
            found[task] = {"value": value, "bar": KEPT, "met": met, "length": far and far["length"]}
    doubled = [row for row in document["growth"] if row["to"] == 2 * row["from"]]
    grown = doubled[-1][LINEAR][0] if doubled else None
    found["growth"] = {"value": grown, "bar": GROWTH, "met": None if grown is None else grown <= GROWTH}
    if doubled:
        found["growth"] |= {"from": doubled[-1]["from"], "to": doubled[-1]["to"]}
    bytes_held = [row[LINEAR] for row in document["state"]]
    found["state"] = {
        "value": bytes_held[-1] / bytes_held[0],
        "bar": 1.0,
        "met": bytes_held[-1] == bytes_held[0] if len(bytes_held) > 1 else None,
    }
    return found
