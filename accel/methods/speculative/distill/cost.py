"""What a draft costs on this machine, and the speed-up to expect of it at a rate of acceptance.

Knows models and clocks. Does not know data or training: how often a draft is right is measured after it has learned.

α: the chance that a drafted token is accepted. γ: tokens drafted a round. c: one draft step in units of one target
step. verify: the target's pass over γ + 1 tokens in the same units (Leviathan et al. 2023 take it for 1, which holds
where reading the weights is all that a pass costs).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError
from accel.methods.speculative.distill.student import Shape, build
from accel.models import cpu_linear
from accel.models.lean import draft_reader, target_for

# steps that a draft makes between two of the target, which pushes the draft's weights out of the processor's cache
DRAFT_STEPS = 4
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Candidate:
    """A shape and what it costs: ``c``, the median of paired measurements, with their 20th and 80th percentiles."""

    shape: Shape
    parameters: int
    c: float
    c_p20: float
    c_p80: float


def tokens_per_round(alpha: float, gamma: int) -> float:
    """τ = (1 − α^(γ+1)) / (1 − α): expected tokens of a round of γ drafted ones (Leviathan et al. 2023, eq. 1)."""
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha={alpha}: a rate of acceptance is from 0 to 1")
    if gamma < 0:
        raise OptionError(f"gamma={gamma}: a draft has 0 tokens or more")
    # the sum is the fraction, without its 0/0 at α = 1
    return float(sum(alpha**i for i in range(gamma + 1)))


def predicted_speedup(alpha: float, c: float, gamma: int, verify: float = 1.0) -> float:
    """τ / (c γ + verify): speed over decoding without drafts (Leviathan et al. 2023, theorem 3.8)."""
    if c < 0 or verify <= 0:
        raise OptionError(f"c={c}, verify={verify}: costs are in units of a target step, c ≥ 0 and verify > 0")
    return tokens_per_round(alpha, gamma) / (c * gamma + verify)


def best_gamma(alpha: float, c: float, longest: int = 16, verify: Mapping[int, float] | None = None) -> int:
    """The draft length of the highest predicted speed-up, the shorter of equals; 0 where drafting does not pay.

    ``verify`` is the cost of verification by draft length (see ``measure_verify``), 1 at any length by default.
    """
    if longest < 0:
        raise OptionError(f"longest={longest}: a draft has 0 tokens or more")
    return max(range(longest + 1), key=lambda gamma: predicted_speedup(alpha, c, gamma, verify_cost(verify, gamma)))


def verify_cost(verify: Mapping[int, float] | None, gamma: int) -> float:
    """The cost at length ``gamma``, on straight lines between the measured ones and from (0, 1); flat beyond them."""
    known = {0: 1.0, **(verify or {})}
    lengths = sorted(known)
    place = bisect_left(lengths, gamma)
    if place == len(lengths):
        return known[lengths[-1]]
    right = lengths[place]
    if right == gamma:
        return known[right]
    left = lengths[place - 1]
    share = (gamma - left) / (right - left)
    return (1 - share) * known[left] + share * known[right]


def measure(
    target: PreTrainedModel, shapes: Sequence[Shape], vocab: int, *, context: int = 128, repeat: int = 7
) -> list[Candidate]:
    """c of a student of each shape with ``vocab`` tokens, behind ``context`` tokens, as attached models decode.

    Target and student take turns, so that a slow moment of the machine hits both sides of a ratio.
    """
    of = target.config.get_text_config(decoder=True).vocab_size
    if not 1 <= vocab <= of:
        raise OptionError(f"draft vocabulary of {vocab}: the target has {of} tokens, keep 1 to {of}")
    _check_counts(context, repeat)
    kept = None if vocab == of else VocabularyMap(torch.arange(vocab), 0, of)
    found = []
    with _stepper(target, context) as step:
        for shape in shapes:
            student = build(target, shape, kept, start="random").to(target.dtype)
            with _stepper(student, context, is_draft=True) as draft_step:
                ratios = paired_ratios(partial(draft_step, 1), partial(step, 1), repeat, DRAFT_STEPS)
            found.append(Candidate(shape, student.num_parameters(), *_quantiles(ratios)))
    return found


def measure_verify(
    target: PreTrainedModel, lengths: Sequence[int] = (1, 3, 7, 15), *, context: int = 128, repeat: int = 7
) -> dict[int, float]:
    """Draft length → what the target's pass over that draft and one token more costs, in target steps (medians)."""
    _check_counts(context, repeat)
    found = {}
    with _stepper(target, context) as step:
        for length in lengths:
            ratios = paired_ratios(partial(step, length + 1), partial(step, 1), repeat)
            found[length] = _quantiles(ratios)[0]
    return found


def paired_ratios(
    one: Callable[[], object],
    other: Callable[[], object],
    repeat: int,
    times: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time of ``one`` (the mean of ``times`` calls) in units of ``other``, ``repeat`` times in turn."""
    ratios = []
    for turn in range(repeat + 1):
        start = clock()
        other()
        middle = clock()
        for _ in range(times):
            one()
        # the first turn allocates and packs
        if turn:
            ratios.append((clock() - middle) / times / (middle - start))
    return ratios


def table(
    candidates: Sequence[Candidate],
    alphas: Sequence[float] = ALPHAS,
    verify: Mapping[int, float] | None = None,
) -> str:
    """The predicted speed-up at each α with the draft length that gives it, one line a candidate: ``1.62x @5``."""
    head = ["shape", "parameters", "c (p20 to p80)", *(f"α={alpha:g}" for alpha in alphas)]
    lines = [head]
    for each in candidates:
        cells = []
        for alpha in alphas:
            gamma = best_gamma(alpha, each.c, verify=verify)
            cells.append(f"{predicted_speedup(alpha, each.c, gamma, verify_cost(verify, gamma)):.2f}x @{gamma}")
        cost = f"{each.c:.3f} ({each.c_p20:.3f} to {each.c_p80:.3f})"
        lines.append([str(each.shape), f"{each.parameters / 1e6:.2f}M", cost, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


@contextmanager
def _stepper(model: PreTrainedModel, context: int, is_draft: bool = False) -> Iterator[Callable[[int], int]]:
    """A function that reads n tokens behind ``context`` others, names the next token and forgets them again."""
    reader = draft_reader(model) if is_draft else target_for(model)
    installed = cpu_linear.install(reader.linears, may_round=is_draft)
    try:
        row = reader.open()
        tokens = torch.arange(context, device=reader.device)[None] % reader.vocab_size
        reader.forward(tokens, [row], [context - 1])
        reader.commit([context], [row])

        def step(n: int) -> int:
            logits = reader.forward(tokens[:, :1].expand(1, n), [row])
            reader.commit([0], [row])
            # a number on the CPU: a GPU has finished by then
            return int(logits[0, -1].argmax())

        yield step
    finally:
        installed.remove()


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return float(found[0]), float(found[1]), float(found[2])


def _check_counts(context: int, repeat: int) -> None:
    if context < 1 or repeat < 1:
        raise OptionError(f"context={context}, repeat={repeat}: both must be 1 or more")
