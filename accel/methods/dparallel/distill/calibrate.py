"""How much a threshold saves and what it costs: a sweep over prompts with known answers, AUP, and the choice.

Knows a denoiser, prompts and answers. Does not know training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accel.distill.checking import is_right
from accel.distill.prompts import Encoded, Prompt
from accel.errors import OptionError
from accel.kernels.unmask import COUNTING_RULES, RULES
from accel.methods.dparallel.distill.trajectories import answers, text_of
from accel.methods.dparallel.options import DParallelOptions
from accel.models.diffusion import Denoiser
from accel.types import Stats

Progress = Callable[[str], None]

# what is tried where nobody says: nats, and probabilities
THRESHOLDS = {
    "entropy": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "confidence": (0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5),
}
# thresholds that nothing but a block's most certain token passes: one token a forward
_ONE = {"entropy": -1.0, "confidence": 2.0}
# points below the first one that a point may be before it does not count at all (AUP)
_DROP = 5.0


@dataclass(frozen=True)
class Point:
    """One threshold. ``accuracy``: per cent of the prompts; ``forwards``, ``tokens``: a prompt's, on average.

    Tokens end with the end token and do not count what stands behind it.
    """

    threshold: float
    accuracy: float | None
    tokens_per_forward: float
    forwards: float
    tokens: float


@dataclass(frozen=True)
class Said:
    """What a model said to prompts, in their order. ``forwards``, ``tokens``: of all, counted as in ``Point``."""

    texts: list[str]
    forwards: int
    tokens: int

    def marks(self, known: Sequence[str]) -> list[bool]:
        """Which texts come to the ``known`` answers."""
        return [is_right(text, answer) for text, answer in zip(self.texts, known, strict=True)]

    def point(self, threshold: float, marks: Sequence[bool] | None) -> Point:
        """The averages; without ``marks`` there is no accuracy."""
        count = len(self.texts)
        return Point(
            threshold=threshold,
            accuracy=None if marks is None else round(100 * sum(marks) / count, 3),
            tokens_per_forward=round(self.tokens / max(self.forwards, 1), 4),
            forwards=round(self.forwards / count, 3),
            tokens=round(self.tokens / count, 3),
        )


def known_answers(prompts: Sequence[Prompt], asked: Encoded) -> list[str | None]:
    """The file's answer to each encoded prompt, as a text."""
    by_digest: dict[str, str | None] = {}
    for each in prompts:
        by_digest.setdefault(each.digest(), each.answer)
    return [by_digest.get(digest) for digest in asked.digests]


def require_answers(known: Sequence[str | None], instead: str) -> list[str]:
    """All of them; OptionError where one is missing."""
    missing = sum(answer is None for answer in known)
    if missing:
        raise OptionError(f"{missing} of {len(known)} prompts have no answer to compare with: add answers{instead}")
    return [answer for answer in known if answer is not None]


def one_token(denoiser: Denoiser) -> DParallelOptions:
    """One token a forward: what a threshold is measured against."""
    rule = _rule(denoiser)
    return DParallelOptions(rule=rule, threshold=_ONE[rule])


def decode(
    denoiser: Denoiser,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: DParallelOptions,
    max_new_tokens: int,
    rows: int,
) -> Said:
    """Answer all prompts greedily, ``rows`` at a time."""
    stats = Stats()
    said = {
        each.index: text_of(tokenizer, each)
        for each in answers(denoiser, enumerate(prompts), options, max_new_tokens, rows, stats)
    }
    # a row's own forwards: those of a batch are shared by its rows
    return Said([said[index] for index in range(len(prompts))], stats.row_calls, stats.generated_tokens)


def evaluate(
    denoiser: Denoiser,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    known: Sequence[str] | None,
    options: DParallelOptions,
    max_new_tokens: int,
    rows: int,
) -> Point:
    """Decode all prompts greedily and hold the answers against ``known``; without it there is no accuracy."""
    said = decode(denoiser, tokenizer, prompts, options, max_new_tokens, rows)
    threshold = denoiser.facts.threshold if options.threshold is None else options.threshold
    return said.point(threshold, None if known is None else said.marks(known))


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, ``one`` being one token a forward, and what was chosen by ``budget`` (points)."""

    rule: str
    one: Point
    points: tuple[Point, ...]
    budget: float
    chosen: Point | None
    aup: float
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"points": [asdict(each) for each in self.points]}


def sweep(
    denoiser: Denoiser,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    known: Sequence[str],
    *,
    thresholds: Sequence[float] = (),
    budget: float = 1.0,
    max_new_tokens: int = 256,
    rows: int = 16,
    one: Point | None = None,
    progress: Progress = lambda message: None,
) -> Sweep:
    """Try thresholds of the model's own rule and choose the fastest that loses at most ``budget`` points of accuracy
    against one token a forward. ``one``: that point, where it is known already."""
    rule = _rule(denoiser)
    tried = check_thresholds(thresholds or THRESHOLDS[rule], rule)
    if not 0 <= budget < math.inf:
        raise OptionError(f"budget={budget}: points of accuracy that may be lost, 0 or more")

    def at(options: DParallelOptions) -> Point:
        progress(f"threshold {options.threshold} …")
        return evaluate(denoiser, tokenizer, prompts, known, options, max_new_tokens, rows)

    one = one or at(one_token(denoiser))
    points = tuple(at(DParallelOptions(rule=rule, threshold=threshold)) for threshold in tried)
    return Sweep(rule, one, points, budget, choose(one, points, budget), aup_of([one, *points]), len(prompts))


def choose(one: Point, points: Sequence[Point], budget: float) -> Point | None:
    """The most tokens a forward among points that lose at most ``budget`` points of accuracy; None where all lose more.

    Of equals the first: thresholds are tried from the careful end.
    """
    assert one.accuracy is not None
    least = one.accuracy - budget
    # a point of accuracy is a float that was divided: 1.0 lost must fit a budget of 1.0
    fits = [each for each in points if each.accuracy is not None and each.accuracy >= least - 1e-6]
    return max(fits, key=lambda each: each.tokens_per_forward, default=None)


def aup(rates: Sequence[float], accuracies: Sequence[float], best: float) -> float:
    """Accuracy under parallelism (d3LLM): accuracy over tokens per forward, the area weighted down below ``best``.

    ρ₁ y₁ + Σ ½ (ρᵢ − ρᵢ₋₁)(yᵢ Wᵢ + yᵢ₋₁ Wᵢ₋₁), W = min(exp(−3 (1 − y / y_max)), 1), over points by rising ρ; those more
    than 5 points below y₁ are left out. ``accuracies`` and ``best`` in per cent.
    """
    points = sorted(zip(rates, accuracies, strict=True))
    if not points or best <= 0:
        return 0.0
    first_rate, first = points[0]
    points = [(rate, each) for rate, each in points if each >= first - _DROP]

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-3 * (1 - accuracy / best)), 1.0)

    area = first_rate * first
    for (rate, each), (before, last) in zip(points[1:], points, strict=False):
        area += 0.5 * (rate - before) * (weighted(each) + weighted(last))
    return area


def aup_of(points: Sequence[Point], best: float | None = None) -> float:
    """The same of a sweep, against its own best accuracy unless another ``best`` is given."""
    accuracies = [each.accuracy or 0.0 for each in points]
    return round(aup([each.tokens_per_forward for each in points], accuracies, best or max(accuracies)), 3)


def check_thresholds(thresholds: Sequence[float], rule: str) -> list[float]:
    """From the careful end, each once; OptionError for what is no threshold."""
    for each in thresholds:
        if not isinstance(each, int | float) or isinstance(each, bool) or not math.isfinite(each):
            raise OptionError(f"thresholds: {each!r} is no finite number; give for example 0.1,0.3,0.5")
    return sorted(set(map(float, thresholds)), reverse=rule == "confidence")


def check_length(limit: int | None, block_length: int, longest: int, max_new_tokens: int) -> None:
    """OptionError where a prompt of ``longest`` tokens and its canvas exceed the model's positions."""
    canvas = -(-max_new_tokens // block_length) * block_length
    if limit is not None and longest + canvas > limit:
        raise OptionError(
            f"max_new_tokens={max_new_tokens}: behind a prompt of {longest} tokens that is {longest + canvas} "
            f"positions, the model has {limit}; ask for less, or leave long prompts out"
        )


def _rule(denoiser: Denoiser) -> str:
    rule = denoiser.facts.rule
    if rule in COUNTING_RULES:
        known = [each for each in RULES if each not in COUNTING_RULES]
        raise OptionError(f"the model's rule {rule!r} has no threshold: give its facts one of {', '.join(known)}")
    return rule
