"""One draw from a distribution with a row's own generator. Knows nothing of models."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token of ``[V]`` with one uniform, by inverting the distribution function in double precision.

    ``torch.multinomial`` takes a random number for every token, which costs a CPU more than a small draft's head.
    """
    total = probabilities.cpu().double().cumsum(-1)
    place = torch.rand(1, dtype=torch.float64, generator=generator) * total[-1]
    token = int(torch.searchsorted(total, place, right=True))
    # the product may round up to the total itself
    return token if token < len(total) else int(probabilities.argmax())
