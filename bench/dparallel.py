"""The suite `dparallel`: what a masked-diffusion model gains by filling several masks a forward, and what it loses.

The same questions are answered one token a forward and by the model's own rule and threshold, without and with the two
caches; beside it stands the model that it was distilled from. Each way of decoding is told by its accuracy, its
forwards, its useful tokens (up to an answer's end) and by the clock. One token a forward with early stopping is what
others are held against: without it a model is compared with its own empty canvas. Measures only;
dparallel_report shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accel.artifacts import tokenizer_digest
from accel.bench import environment, saving, summary
from accel.bench.arms import Arm, attached
from accel.bench.measure import clocked, generate_kwargs, left_padded, rotated
from accel.bench.metrics import output_throughput, paired, paired_difference
from accel.bench.workloads import Prompt, digest, encode, load_answered, sample
from accel.errors import OptionError
from accel.methods.dparallel.distill.calibrate import Point, aup_of, check_length, decode, one_token, sweep
from accel.methods.dparallel.distill.opened import Opened, open_model
from accel.methods.dparallel.options import CACHES, DParallelOptions

Told = Callable[[str], None]

SUITE = "dparallel"
# the arms; BASE is the model that MODEL was distilled from, by MODEL's rule and threshold
CANVAS, ONE, BASE, BASE_ONE, FAST = "one token, whole canvas", "one token", "base", "base, one token", "dparallel"
# generated word problems that nothing was learned from
EMBEDDED = Path(__file__).parent / "data" / "arithmetic.jsonl"


@dataclass(frozen=True)
class Plan:
    """``base``: the model before distillation, None for none; ``questions``: JSON lines with question and answer."""

    model: str
    base: str | None = None
    questions: Path = EMBEDDED
    limit: int | None = None
    # None: what the artifact was trained with
    max_new_tokens: int | None = None
    # questions that are answered together
    rows: int = 16
    # questions that are answered by the clock, and how often
    timed: int = 32
    repeat: int = 3
    # also try other thresholds
    sweep: bool = True
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "rows", "timed", "repeat"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: must be 1 or more")


@dataclass(frozen=True)
class Way:
    """A row of the table: a model, and how it decodes."""

    name: str
    opened: Opened
    options: DParallelOptions

    def arm(self) -> Arm:
        """The same through the model's own generate()."""
        return attached(self.name, method="dparallel", **asdict(self.options))


@dataclass(frozen=True)
class Asked:
    """The questions as the models read them, with their answers and the length limit of a reply."""

    prompts: list[Prompt]
    ids: list[list[int]]
    known: list[str]
    max_new_tokens: int


def carry_out(plan: Plan, told: Told = lambda message: None) -> dict[str, Any]:
    """Measure as ``plan`` says and return the document, which is also written to ``plan.output``."""
    prompts = load_answered(plan.questions)
    prompts = prompts if plan.limit is None else sample(prompts, plan.limit)
    told("loading the model …")
    ours = open_model(plan.model, device=plan.device, dtype=plan.dtype)
    base = None if plan.base is None else _base(plan, ours)
    asked = _asked(plan, ours, base, prompts)
    ways = ways_of(ours, base)
    arms: dict[str, dict[str, Any]] = {}
    points: dict[str, Point] = {}
    for way in ways:
        told(f"{way.name}: {len(prompts)} answers …")
        arms[way.name], points[way.name] = _answered(way, asked, plan.rows)
    for row in arms.values():
        row["forwards_ratio"] = arms[ONE]["forwards"] / row["forwards"]
    timed = min(plan.timed, len(prompts))
    rows = min(plan.rows, timed)
    # whole batches only: a last one of fewer rows would stand for one of many
    some = asked.ids[: timed // rows * rows]
    runners = [(way.arm(), way.opened.model) for way in ways]
    kwargs = generate_kwargs(ours.tokenizer, asked.max_new_tokens, 0.0)
    for size in sorted({1, rows}):
        for name, figures in _timed(runners, some, size, plan.repeat, kwargs, told).items():
            arms[name][f"at_{size}"] = figures
    sweeps = _sweeps(plan, ours, base, asked, points, told) if plan.sweep else {}
    settings = {
        "suite": SUITE,
        "model": plan.model,
        "base": plan.base,
        "questions": len(prompts),
        "questions_sha256": digest(prompts),
        "max_new_tokens": asked.max_new_tokens,
        **{name: getattr(ours.facts, name) for name in ("rule", "threshold", "strict", "block_length")},
        "rows": rows,
        "timed": len(some),
        "repeat": plan.repeat,
        "dtype": str(ours.model.dtype).removeprefix("torch."),
    }
    frame = summary.frame(
        settings=settings,
        environment=environment.describe(ours.model.device),
        command=plan.command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=True,
        notes=[] if ours.denoiser.supports_cache else [f"{plan.model} keeps no keys and values: no arms with a cache"],
    )
    best = max((each.accuracy or 0.0 for points in sweeps.values() for each in points), default=0.0)
    document = frame | {
        "reference": ONE,
        "arms": arms,
        "verdicts": {name: _verdict(arms, name, rows) for name in (ONE, BASE, BASE_ONE) if name in arms},
        "sweeps": {name: [asdict(each) for each in points] for name, points in sweeps.items()},
        "aup": {name: aup_of(points, best) for name, points in sweeps.items()},
    }
    if plan.output:
        saving.write(plan.output, saving.dump(document))
    return document


def ways_of(ours: Opened, base: Opened | None) -> list[Way]:
    """The rows of the table, in its order."""
    facts = ours.facts
    one = one_token(ours.denoiser)
    own = DParallelOptions(rule=facts.rule, threshold=facts.threshold, strict=facts.strict)
    ways = [Way(CANVAS, ours, replace(one, early_stop=False)), Way(ONE, ours, one)]
    if base is not None:
        ways += [Way(BASE, base, own), Way(BASE_ONE, base, one)]
    ways.append(Way(FAST, ours, own))
    if ours.denoiser.supports_cache:
        ways += [Way(f"{FAST}, {cache} cache", ours, replace(own, cache=cache)) for cache in CACHES if cache != "none"]
    return ways


def _base(plan: Plan, ours: Opened) -> Opened:
    """The undistilled model, by the distilled one's rule; OptionError where one table cannot hold both."""
    assert plan.base is not None
    base = open_model(plan.base, device=plan.device, dtype=plan.dtype)
    if tokenizer_digest(base.tokenizer) != tokenizer_digest(ours.tokenizer):
        raise OptionError(
            f"{plan.base} has another tokenizer than {plan.model}: their forwards are not comparable; give the model "
            "that it was distilled from, or leave -a out"
        )
    if base.facts.block_length != ours.facts.block_length:
        raise OptionError(
            f"{plan.base} fills blocks of {base.facts.block_length} tokens, {plan.model} of "
            f"{ours.facts.block_length}: give the model that it was distilled from, or leave -a out"
        )
    return base.with_rule_of(ours.facts)


def _asked(plan: Plan, ours: Opened, base: Opened | None, prompts: list[Prompt]) -> Asked:
    max_new_tokens = plan.max_new_tokens or ours.max_new_tokens
    ids = [encode(ours.tokenizer, prompt.turns[:1])[0].tolist() for prompt in prompts]
    for each in (ours, base):
        if each is not None:
            longest = max(map(len, ids))
            check_length(each.denoiser.max_positions, each.facts.block_length, longest, max_new_tokens)
    return Asked(prompts, ids, [prompt.answer or "" for prompt in prompts], max_new_tokens)


def _answered(way: Way, asked: Asked, rows: int) -> tuple[dict[str, Any], Point]:
    """Accuracy and counts, which one pass over all questions tells."""
    said = decode(way.opened.denoiser, way.opened.tokenizer, asked.ids, way.options, asked.max_new_tokens, rows)
    marks = said.marks(asked.known)
    threshold = way.options.threshold
    assert threshold is not None, "rules that count are refused"
    point = said.point(threshold, marks)
    row = {"model": way.opened.name, "early_stop": way.options.early_stop, "cache": way.options.cache}
    return row | asdict(point) | {"right": marks}, point


def _timed(
    runners: Sequence[tuple[Arm, Any]],
    ids: Sequence[Sequence[int]],
    size: int,
    repeat: int,
    kwargs: Mapping[str, Any],
    told: Told,
) -> dict[str, dict[str, Any]]:
    """All of ``ids``, ``size`` at a time, every arm on a batch before the next batch; ratios within a repetition."""
    pieces = [left_padded(ids[at : at + size], runners[0][1].device) for at in range(0, len(ids), size)]
    seconds = {arm.name: [0.0] * repeat for arm, _ in runners}
    tokens = dict.fromkeys(seconds, 0)
    # the first round warms caches up
    for number in range(-1, repeat):
        told(f"timing: {size} at once, {max(number, 0) + 1} of {repeat} …")
        for place, piece in enumerate(pieces if number >= 0 else pieces[:1]):
            for arm, model in rotated(runners, number + place):
                with arm.prepare(model):
                    _, _, taken = clocked(model, **piece, **kwargs)
                    made = arm.stats(model).generated_tokens
                if number >= 0:
                    seconds[arm.name][number] += taken
                    tokens[arm.name] += made
    return {
        name: {
            "tokens_per_second": output_throughput([tokens[name]], each),
            "speedup": paired(seconds[ONE], each),
            "seconds": each,
        }
        for name, each in seconds.items()
    }


def _sweeps(
    plan: Plan, ours: Opened, base: Opened | None, asked: Asked, points: Mapping[str, Point], told: Told
) -> dict[str, list[Point]]:
    """One token a forward, then the thresholds, of both models on the same questions."""
    found = {}
    for name, opened, one in ((FAST, ours, ONE), (BASE, base, BASE_ONE)):
        if opened is not None:
            result = sweep(
                opened.denoiser,
                opened.tokenizer,
                asked.ids,
                asked.known,
                max_new_tokens=asked.max_new_tokens,
                rows=plan.rows,
                one=points[one],
                progress=lambda message, name=name: told(f"{name}: {message}"),  # type: ignore[misc]
            )
            found[name] = [result.one, *result.points]
    return found


def _verdict(arms: Mapping[str, Mapping[str, Any]], other: str, rows: int) -> dict[str, Any]:
    """FAST against another arm: forwards and seconds of the other for one of its own, and points of accuracy gained."""
    mine, theirs = arms[FAST], arms[other]
    gained = paired_difference(mine["right"], theirs["right"])
    times = {f"at_{size}": paired(theirs[f"at_{size}"]["seconds"], mine[f"at_{size}"]["seconds"]) for size in {1, rows}}
    return {
        "forwards_ratio": theirs["forwards"] / mine["forwards"],
        **times,
        "accuracy": {name: 100 * value for name, value in asdict(gained).items()},
    }
