"""From the conversions that a user hands over to the one for a model, and to what it is there for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from accel.artifacts import Artifact
from accel.engine.by_length import ByLength
from accel.errors import IncompatibleError, OptionError
from accel.methods.lawcat.artifact import Lawcat
from accel.models.linear import Conversion

ROLES = ("target", "draft", "auto")


def lawcat_for(
    found: Sequence[Lawcat | Artifact], model: PreTrainedModel, tokenizer: Any, role: object
) -> Lawcat | None:
    """The conversion among what was handed over, read for ``model``; ``role``: what the user wants of it."""
    is_length = type(role) is int and role > 0
    if role is not None and role not in ROLES and not is_length:
        raise OptionError(
            f"lawcat={role!r}: choose one of {', '.join(map(repr, ROLES))}, or the number of tokens from which on a "
            "prompt is read by linear layers"
        )
    if not found:
        if role is not None:
            raise OptionError(f"lawcat={role!r} without a lawcat artifact: name one, or leave the option out")
        return None
    if len(found) > 1:
        raise IncompatibleError(f"{len(found)} lawcat artifacts given: a model's layers are converted once; give one")
    given = found[0]
    if isinstance(given, Artifact):
        return Lawcat.load(given, model, tokenizer)
    # made for a live model: the same checks as for a file
    return Lawcat.of(given.name, given.spec, given.tensors, model, low_rank=given.low_rank)


def by_length(conversion: Conversion | None, role: object) -> ByLength | None:
    """What chooses between softmax and linear layers call by call; None where the user did not ask for it."""
    if conversion is None or role in (None, "target"):
        return None
    return ByLength(conversion, role if isinstance(role, int) else None)
