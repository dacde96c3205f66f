"""What a user may choose about speculative decoding; every mistake is one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from accel.errors import OptionError, unknown_name

DRAFTERS = ("auto", "cascade", "lm", "ngram", "suffix")
ACCEPTANCES = ("auto", "block", "token")
LENIENCE_RULES = ("exp", "lin", "sq")
MAX_DRAFT_LENGTH = 64


@dataclass(frozen=True)
class SpeculativeOptions:
    """Options of method="speculative"."""

    drafter: str = field(
        default="auto",
        metadata={
            "help": "who drafts: lm (the draft model), suffix, ngram, cascade (suffix where it is confident, else lm), "
            "auto (cascade with a draft model, suffix without)"
        },
    )
    draft_length: int | str = field(
        default="auto",
        metadata={"help": "tokens drafted a round: a number, or auto (from measured acceptance and cost, per row)"},
    )
    max_draft_length: int = field(
        default=16,
        metadata={"help": f"the most that draft_length='auto' may draft in a round (1 to {MAX_DRAFT_LENGTH})"},
    )
    draft_steps: int = field(
        default=1,
        metadata={
            "help": "forward passes that a masked-diffusion draft takes for a block: more of them guess better and "
            "cost more"
        },
    )
    acceptance: str = field(
        default="auto",
        metadata={
            "help": "how sampled drafts are verified: token, block, or auto (block where it applies); all lossless"
        },
    )
    lenience: tuple[str, float] | None = field(
        default=None,
        metadata={
            "help": "lossy: accept with min(1, f(p)/q) as in DistillSpec; (rule, ε) with rule lin: p/ε, sq: p/ε², "
            "exp: p^ε and 0 < ε ≤ 1"
        },
    )

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise OptionError(unknown_name("drafter", str(self.drafter), DRAFTERS))
        if self.acceptance not in ACCEPTANCES:
            raise OptionError(unknown_name("acceptance", str(self.acceptance), ACCEPTANCES))
        if self.draft_length != "auto":
            _check_length("draft_length", self.draft_length, "or 'auto'; use method='plain' for no drafting")
        _check_length("max_draft_length", self.max_draft_length, "")
        _check_length("draft_steps", self.draft_steps, "")
        if self.lenience is not None:
            self._check_lenience(self.lenience)

    def _check_lenience(self, lenience: object) -> None:
        if not isinstance(lenience, tuple | list) or len(lenience) != 2:
            raise OptionError(f"lenience={lenience!r}: give (rule, ε), for example ('lin', 0.5), or None for lossless")
        rule, epsilon = lenience
        if rule not in LENIENCE_RULES:
            raise OptionError(unknown_name("lenience rule", str(rule), LENIENCE_RULES))
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 1:
            raise OptionError(f"lenience ε={epsilon!r}: must be a number in (0, 1]; 1 is lossless")
        if self.acceptance == "block":
            raise OptionError(
                "lenience with acceptance='block': lenience is defined token by token; use 'token' or 'auto'"
            )
        object.__setattr__(self, "lenience", (rule, float(epsilon)))

    @property
    def longest_draft(self) -> int:
        return self.max_draft_length if isinstance(self.draft_length, str) else self.draft_length

    @property
    def is_lossless(self) -> bool:
        return self.lenience is None or self.lenience[1] == 1.0


def _check_length(name: str, value: object, alternative: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{name}={value!r}: give a whole number from 1 to {MAX_DRAFT_LENGTH} {alternative}".rstrip())
    if not 1 <= value <= MAX_DRAFT_LENGTH:
        raise OptionError(f"{name}={value}: must be from 1 to {MAX_DRAFT_LENGTH} {alternative}".rstrip())
