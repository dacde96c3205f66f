"""Which masked positions of a masked-diffusion model to fill, and with what: certainty and commit rules (README.md).

Knows logits and masks. Does not know models, blocks or schedules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.device import runs_triton
from accel.kernels.unmask import reference
from accel.kernels.unmask.reference import COUNTING_RULES, RULES, Certainty

__all__ = ["COUNTING_RULES", "RULES", "Certainty", "certainty", "commit"]


def certainty(logits: Tensor, *, forbidden: int | None = None) -> Certainty:
    """The most likely token of every position, its probability and the distribution's entropy, in one reading.

    logits [..., V], floating point, -inf allowed → token int64 [...], probability fp32 [...], entropy fp32 [...] (nats)

    ``forbidden``: a token that cannot be chosen and has probability 0 (the mask token: a position filled with it would
    never be done). The first index wins ties. A position whose logits are all -inf has probability and entropy NaN.
    """
    if logits.ndim < 1 or not logits.shape[-1] or not logits.is_floating_point():
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}: it must be floating point [..., V], V ≥ 1")
    V = logits.shape[-1]
    if forbidden is not None and not 0 <= forbidden < V:
        raise ValueError(f"forbidden={forbidden}: must be a token id in 0..{V - 1}, or None")
    if runs_triton(logits):
        from accel.kernels.unmask import triton

        return triton.certainty(logits, forbidden=forbidden)
    return reference.certainty(logits, forbidden=forbidden)


def commit(
    certainty: Certainty,
    masked: Tensor,
    *,
    rule: str,
    threshold: float | None = None,
    count: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """The masked positions to fill in this step: always a row's most certain one, and more by the rule.

    certainty of positions [B, L], masked bool [B, L] (the candidates) → bool [B, L]

    ``rule``: "entropy" (dParallel, arXiv 2509.26488: entropy ≤ threshold, in nats), "confidence" (Fast-dLLM:
    probability ≥ threshold), "top_k" (LLaDA: the count[b] most probable) or "top_k_entropy" (the count[b] of least
    entropy). ``strict``: < and > instead of ≤ and ≥ (Dream). ``count``: int64 [B], ≥ 0; 0 commits nothing.
    Among equals the lower position is the more certain one. A row without candidates commits nothing.
    """
    shape = tuple(certainty.token.shape)
    if len(shape) != 2 or masked.shape != shape or masked.dtype != torch.bool:
        raise ValueError(
            f"masked is {masked.dtype} {list(masked.shape)} for certainty {list(shape)}: both must be [B, L]"
        )
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
    counts = rule in COUNTING_RULES
    if counts and (count is None or count.shape != shape[:1] or count.dtype != torch.int64 or threshold is not None):
        raise ValueError(f"rule={rule!r} takes count, int64 [B] = [{shape[0]}], and no threshold")
    if not counts and (threshold is None or count is not None):
        raise ValueError(f"rule={rule!r} takes threshold, a number, and no count")
    if runs_triton(masked):
        from accel.kernels.unmask import triton

        return triton.commit(certainty, masked, rule=rule, threshold=threshold, count=count, strict=strict)
    return reference.commit(certainty, masked, rule=rule, threshold=threshold, count=count, strict=strict)
