"""dParallel's published decoding as a loop over single candidates, in Python's own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def one_by_one(
    logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    length: int,
    *,
    mask: int,
    block: int,
    rule: str,
    threshold: float,
    strict: bool,
) -> tuple[list[int], int]:
    """One row, one block after the other → (new tokens, forwards). ``logits``: [T] → [T, V]; entropy or confidence."""
    row, forwards = [*prompt, *[mask] * length], 0
    for begin in range(len(prompt), len(row), block):
        while mask in row[begin : begin + block]:
            forwards += 1
            said = logits(torch.tensor(row))
            found = []
            for position in (p for p in range(begin, begin + block) if row[p] == mask):
                x = [v if token != mask else -math.inf for token, v in enumerate(said[position].tolist())]
                total = math.log(sum(math.exp(v - max(x)) for v in x)) + max(x)
                p = [math.exp(v - total) for v in x]
                entropy = -sum(q * math.log(q) for q in p if q > 0)
                found.append((entropy if rule == "entropy" else -max(p), position, p.index(max(p))))
            found.sort()
            limit = threshold if rule == "entropy" else -threshold
            for place, (doubt, position, token) in enumerate(found):
                passes = doubt < limit if strict else doubt <= limit
                if place and not passes:
                    break
                row[position] = token
    return row[len(prompt) :], forwards
