"""The gate: a speed-up counts only where the output is the reference's. Knows nothing of clocks.

Greedy outputs must be equal token by token, or part ways at a tie: where the plain model, given everything both
outputs share, scores the two tokens so close that rounding decides (transformers' own rule for similar outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, tensor

IDENTICAL = "identical"
SIMILAR = "similar"
FAILED = "failed"
# the method says that it does not keep the target's distribution, so a difference is no fault
LOSSY = "lossy"
# drawn at a temperature: outputs cannot be compared token by token
SAMPLED = "sampled"

# float32 logits of a batch of one and of several positions differ by some 1e-5 to 1e-4
ABSOLUTE_TOLERANCE = 1e-3
# in half precision rounding grows with the logits: this many units in the last place of the largest
ULPS = 2


@dataclass(frozen=True)
class Verdict:
    """What the gate found; ``margin`` is the distance of the two logits where outputs differ."""

    name: str
    margin: float | None = None
    reason: str = ""


def compare(model: Any, input_ids: Tensor, reference: Sequence[int], tokens: Sequence[int]) -> Verdict:
    """Hold ``tokens`` to the ``reference`` that the plain ``model``'s greedy decoding gave for ``input_ids`` [1, T]."""
    reference, tokens = list(reference), list(tokens)
    if tokens == reference:
        return Verdict(IDENTICAL)
    shared = next(
        (i for i, (theirs, ours) in enumerate(zip(reference, tokens, strict=False)) if theirs != ours),
        min(len(reference), len(tokens)),
    )
    if shared in (len(reference), len(tokens)):
        return Verdict(FAILED, reason=f"ended after {len(tokens)} tokens where the reference has {len(reference)}")
    theirs, ours = reference[shared], tokens[shared]
    logits = next_logits(model, input_ids, reference[:shared])
    margin = float((logits[theirs] - logits[ours]).abs())
    allowed = tolerance(logits, next(model.parameters()).dtype)
    if margin <= allowed:
        return Verdict(SIMILAR, margin)
    reason = f"token {shared} is {ours} and the reference has {theirs}; logits differ by {margin:.3g} > {allowed:.3g}"
    return Verdict(FAILED, margin, reason)


@torch.no_grad()
def next_logits(model: Any, input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """The plain model's logits [V] after the prompt ``input_ids`` [1, T] and ``tokens``, from one forward."""
    suffix = tensor([list(tokens)], dtype=input_ids.dtype, device=input_ids.device)
    # a row of logits for every position of a long prompt would take hundreds of megabytes
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(torch.cat([input_ids, suffix], dim=1), **last).logits[0, -1].float()


def tolerance(logits: Tensor, dtype: torch.dtype) -> float:
    """How close two logits must be for rounding to decide between them."""
    return max(ABSOLUTE_TOLERANCE, ULPS * torch.finfo(dtype).eps * float(logits.abs().max()))
