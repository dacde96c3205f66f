"""Certainty of masked positions and the rules that commit them: the plain PyTorch statement, also the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accel.kernels.common import first_argmax

# these fill a number of positions, the others those that pass a threshold
COUNTING_RULES = ("top_k", "top_k_entropy")
RULES = ("entropy", "confidence", *COUNTING_RULES)


class Certainty(NamedTuple):
    """``token`` int64: the argmax; ``probability`` fp32: its probability; ``entropy`` fp32: in nats; one shape."""

    token: Tensor
    probability: Tensor
    entropy: Tensor


def certainty(logits: Tensor, *, forbidden: int | None = None) -> Certainty:
    """logits [..., V] → Certainty [...]; H = −Σ p ln p, where p = 0 adds nothing."""
    x = logits.to(torch.float32, copy=True)
    if forbidden is not None:
        x[..., forbidden] = -torch.inf
    token = first_argmax(x)
    best = x.gather(-1, token[..., None])
    # torch's own softmax adds a vocabulary of 150,000 up one by one on the CPU, which costs two digits of fp32
    log_p = x - best - (x - best).exp().sum(-1, keepdim=True).log()
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, p).sum(-1)
    return Certainty(token, p.gather(-1, token[..., None])[..., 0], entropy)


def commit(
    certainty: Certainty,
    masked: Tensor,
    *,
    rule: str,
    threshold: float | None = None,
    count: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """masked [B, L] → bool [B, L]; see ``accel.kernels.unmask.commit``."""
    # lower is more certain; the sort is stable, so that among equals the lower position comes first
    doubt = certainty.entropy if rule.endswith("entropy") else -certainty.probability
    order = doubt.masked_fill(~masked, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    if count is not None:
        return masked & (rank < count[:, None])
    assert threshold is not None
    limit = threshold if rule == "entropy" else -threshold
    certain = doubt < limit if strict else doubt <= limit
    return masked & (certain | (rank == 0))
