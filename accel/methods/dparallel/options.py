"""What a user may choose about decoding a masked-diffusion model; every mistake is one line.

Whatever is left out comes from the model's own facts. Knows no model and no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

from accel.errors import OptionError, unknown_name
from accel.kernels.unmask import COUNTING_RULES, RULES
from accel.models.diffusion.facts import DiffusionFacts

CACHES = ("none", "prefix", "dual")

Value = TypeVar("Value")


@dataclass(frozen=True)
class DParallelOptions:
    """Options of method="dparallel"; None stands for what the model's facts say."""

    rule: str | None = field(
        default=None,
        metadata={
            "help": "which masks a forward fills, besides the most certain one: entropy or confidence (those that pass "
            "the threshold), top_k or top_k_entropy (a fixed number); none is the model's own"
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "the most entropy (in nats) or the least probability of a token that is filled in beside the most "
            "certain one; none is the model's own"
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "tokens that are filled together before the next ones; none is the model's own"},
    )
    strict: bool | None = field(
        default=None,
        metadata={"help": "< and > instead of ≤ and ≥ at the threshold; none is the model's own"},
    )
    cache: str = field(
        default="none",
        metadata={
            "help": "what is read once a block and not again: none (exact), prefix (what stands before it), dual (what "
            "stands behind it too); the last two are approximate"
        },
    )
    early_stop: bool = field(
        default=True,
        metadata={"help": "end a row as soon as the text before its end token is settled; the text is the same"},
    )
    steps: int | None = field(
        default=None,
        metadata={"help": "forwards a block with the rules top_k and top_k_entropy; none is one a token"},
    )

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in RULES:
            raise OptionError(unknown_name("rule", str(self.rule), RULES))
        if self.cache not in CACHES:
            raise OptionError(unknown_name("cache", str(self.cache), CACHES))
        for name in ("block_length", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name}={value!r}: give a whole number ≥ 1, or None for the default")
        for name in ("strict", "early_stop"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "early_stop"):
                raise OptionError(f"{name}={value!r}: give True or False")
        if self.threshold is not None:
            self._check_threshold(self.threshold)

    def plan(self, facts: DiffusionFacts) -> Plan:
        """These options with the model's facts where nothing was chosen; choices that contradict are refused."""
        rule = self.rule or facts.rule
        if rule in COUNTING_RULES:
            if self.threshold is not None:
                raise OptionError(
                    f"threshold={self.threshold} with rule={rule!r}, which fills a fixed number: give steps=, or use "
                    "rule 'entropy' or 'confidence'"
                )
        elif self.steps is not None:
            raise OptionError(
                f"steps={self.steps} with rule={rule!r}, which fills what passes the threshold: give threshold=, or "
                "use rule 'top_k'"
            )
        elif self.threshold is None and rule != facts.rule:
            unit = "a probability, for example 0.9" if rule == "confidence" else "nats, for example 0.5"
            raise OptionError(
                f"rule={rule!r} without a threshold: the model's own is one of rule {facts.rule!r}; give threshold= "
                f"({unit})"
            )
        return Plan(
            rule=rule,
            threshold=None if rule in COUNTING_RULES else _first(self.threshold, facts.threshold),
            strict=_first(self.strict, facts.strict),
            block_length=_first(self.block_length, facts.block_length),
            steps=self.steps,
        )

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse a block length that somebody chose for a length it does not divide, as the published loops do.

        The model's own block length says nothing about the length of a text: the canvas is then rounded up.
        """
        length = self.block_length
        if length is not None and max_new_tokens % length:
            below = max_new_tokens // length * length
            nearest = f"{below} or {below + length}" if below else str(length)
            raise OptionError(
                f"block_length={length} does not divide max_new_tokens={max_new_tokens}: set max_new_tokens to "
                f"{nearest}, or leave block_length out"
            )

    def _check_threshold(self, threshold: object) -> None:
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not is_number or math.isnan(float(threshold)):  # type: ignore[arg-type]
            raise OptionError(
                f"threshold={threshold!r}: give a number; below 0 nats is one token a forward, inf one forward a block"
            )


@dataclass(frozen=True)
class Plan:
    """How one call fills masks: options and facts together."""

    rule: str
    # None with the rules that count
    threshold: float | None
    strict: bool
    block_length: int
    # forwards a block of the rules that count; None is one a token
    steps: int | None

    def counts(self, num_masks: int) -> list[int]:
        """How many of ``num_masks`` positions each forward of a block fills, the larger numbers first (LLaDA).

        Never 0: where there are more steps than masks, the forwards that would fill nothing are not run.
        """
        steps = min(self.steps or num_masks, num_masks)
        return [num_masks // steps + (step < num_masks % steps) for step in range(steps)]


def _first(chosen: Value | None, own: Value) -> Value:
    return own if chosen is None else chosen
