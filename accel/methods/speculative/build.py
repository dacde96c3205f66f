"""From the user's choice of drafter to the drafter itself."""

from __future__ import annotations

from accel.drafters.base import Drafter, drafts_at_once
from accel.drafters.cascade import CascadeDrafter
from accel.drafters.ngram import NgramDrafter
from accel.drafters.suffix import SuffixDrafter
from accel.errors import OptionError
from accel.methods.speculative.decoder import Speculator
from accel.methods.speculative.options import SpeculativeOptions


def create_speculator(options: SpeculativeOptions, draft: Drafter | None) -> Speculator:
    """``draft``: the drafter made from the user's artifact, where there is one."""
    drafter = create_drafter(options.drafter, draft)
    if options.draft_steps > 1 and not drafts_at_once(drafter):
        raise OptionError(
            f"draft_steps={options.draft_steps} with drafter {drafter.name!r}, which has no steps: they are a "
            "masked-diffusion draft's; leave draft_steps out"
        )
    return Speculator.create(drafter, options)


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
