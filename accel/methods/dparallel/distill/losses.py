"""What hidden tokens cost: cross entropy, and for certainty forcing the entropy of what is right already.

Knows logits and labels. Does not know masks, models or optimisers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# a forbidden token's logit: probability 0 in every precision, and a product with it is 0 and not NaN
_NEVER = -1e30


class Parts(NamedTuple):
    """A loss with a gradient, and what it is made of without one. ``correct``: share of tokens that are right."""

    loss: Tensor
    cross_entropy: float
    entropy: float
    correct: float


def without(logits: Tensor, token: int) -> Tensor:
    """logits [N, V] with one token made impossible: decoding never outputs the mask, so it must not hold any mass."""
    return logits.float().index_fill(-1, torch.tensor([token], device=logits.device), _NEVER)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−ln p(label), logits [N, V] fp32, labels int64 [N] → [N]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), [N, V] fp32 → [N]."""
    scaled = logits / temperature
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def certainty_forcing(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    tokens: int,
    *,
    mask_token: int,
    beta: float,
    temperature: float = 0.5,
) -> Parts:
    """Σ weight · CE / tokens + β · mean entropy of the tokens whose most likely value is the label (arXiv 2509.26488).

    logits [N, V], labels int64 [N], weight fp32 [N]; ``tokens``: of how many tokens the weighted sum stands for.
    The cross entropy keeps temperature 1; the entropy is that at ``temperature``, which lets the loss reach beyond
    the first two candidates later. Where nothing is right yet there is nothing to make certain. β = 0: cross entropy
    alone.
    """
    logits = without(logits, mask_token)
    ce = cross_entropy(logits, labels)
    loss = (weight * ce).sum() / max(tokens, 1)
    right = logits.detach().argmax(-1) == labels
    count = int(right.sum())
    sharp = logits.new_zeros(())
    if count and beta > 0:
        sharp = entropy(logits[right], temperature).mean()
        loss = loss + beta * sharp
    elif count:
        sharp = entropy(logits.detach()[right], temperature).mean()
    mean = float(ce.detach().mean()) if len(labels) else 0.0
    return Parts(loss, mean, float(sharp.detach()), count / max(len(labels), 1))
