"""From the user's choice of drafter to the drafter itself."""

from __future__ import annotations

from accel.drafters.base import Drafter
from accel.drafters.cascade import CascadeDrafter
from accel.drafters.ngram import NgramDrafter
from accel.drafters.suffix import SuffixDrafter
from accel.errors import OptionError
from accel.methods.speculative.decoder import Speculator
from accel.methods.speculative.options import SpeculativeOptions


def create_speculator(options: SpeculativeOptions, draft: Drafter | None) -> Speculator:
    """``draft``: the drafter made from the user's artifact, where there is one."""
    return Speculator.create(create_drafter(options.drafter, draft), options)


def create_drafter(name: str, draft: Drafter | None) -> Drafter:
    """The drafter that ``drafter=name`` asks for."""
    if name in ("lm", "cascade") and draft is None:
        raise OptionError(f"drafter={name!r} needs a draft model: pass one as an artifact, or use 'suffix' or 'ngram'")
    if name == "ngram":
        return NgramDrafter()
    if name == "suffix" or draft is None:
        return SuffixDrafter()
    if name == "lm":
        return draft
    return CascadeDrafter(SuffixDrafter(), draft)
