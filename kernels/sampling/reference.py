"""Penalties, temperature, truncation, the draw and log-probabilities: the plain PyTorch statement, also the CPU path.

Probability is counted in whole numbers: the weight of a token is ⌊e^((x − max) / T) · 2^40⌋. Sums of whole numbers do
not depend on their order, so which tokens are kept and which one is drawn are defined to the last bit (README.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from accel.kernels.common import first_argmax
from accel.kernels.sampling.settings import (
    FREQUENCY,
    GREEDY,
    MIN_P,
    PRESENCE,
    REPETITION,
    SCALE,
    TOP_K,
    TOP_P,
    Settings,
)

# a weight of 1 as a whole number: 2^23 tokens of equal weight still fit an int64
UNIT = 2.0**40
# Philox4x32-10 (Salmon et al. 2011): the multipliers, and what the key grows by each round
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)


class Sampled(NamedTuple):
    """``token`` int64 [R]; ``logprob`` fp32 [R]: its log-probability; the n most likely tokens, most likely first:
    ``top_tokens`` int64 [R, n] and ``top_logprobs`` fp32 [R, n]."""

    token: Tensor
    logprob: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


def sample(
    logits: Tensor,
    settings: Settings,
    *,
    counts: Tensor | None = None,
    uniforms: Tensor | None = None,
    top_logprobs: int = 0,
    logprobs_of: str = "processed",
) -> Sampled:
    """logits [R, V], counts [R, V], uniforms fp64 [R] → Sampled; see ``accel.kernels.sampling.sample``."""
    table = settings.table(len(logits), logits.device)
    x = penalised(logits, table, counts if settings.penalises else None)
    top = x.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise ValueError(NOTHING_TO_CHOOSE)
    # (x − max) / T is what x/T − max(x/T) is, without overflow when T is tiny
    share = ((x - top) * table[:, SCALE, None]).exp_()
    kept = _kept(x, share, table) if settings.truncates else None
    if kept is not None:
        share *= kept
    token = first_argmax(x) if uniforms is None else _draw(_weight(share), uniforms)
    greedy = table[:, GREEDY] > 0
    if uniforms is not None and bool(greedy.any()):
        token = torch.where(greedy, first_argmax(x), token)

    scale, total = table[:, SCALE, None], share.sum(-1, keepdim=True)
    if logprobs_of == "raw":
        x, kept, scale = logits.float(), None, torch.ones_like(scale)
        top = x.amax(-1, keepdim=True)
        total = (x - top).exp_().sum(-1, keepdim=True)
    best = _largest(x, top_logprobs)
    at = torch.cat([token[:, None], best], 1)
    log_p = (x.gather(1, at) - top) * scale - total.log()
    if kept is not None:
        log_p = log_p.masked_fill(~kept.gather(1, at), -torch.inf)
    return Sampled(token, log_p[:, 0], best, log_p[:, 1:])


def penalised(logits: Tensor, table: Tensor, counts: Tensor | None) -> Tensor:
    """logits [R, V], counts [R, V] of how often each token occurred → fp32 [R, V]; before temperature."""
    x = logits.float().contiguous()
    if counts is None:
        return x
    repetition, presence, frequency = (table[:, i, None] for i in (REPETITION, PRESENCE, FREQUENCY))
    repeated = torch.where(x < 0, x * repetition, x / repetition) - counts * frequency - presence
    return torch.where(counts > 0, repeated, x)


def _kept(x: Tensor, share: Tensor, table: Tensor) -> Tensor:
    """x [R, V], share = e^((x − max) / T) [R, V] → bool [R, V]: what top-k, then top-p, then min-p leave."""
    V = x.shape[1]
    sampled = table[:, GREEDY] == 0
    by_k = sampled & (table[:, TOP_K] > 0) & (table[:, TOP_K] < V)
    by_p = sampled & (table[:, TOP_P] < 1)
    threshold = x.new_full((len(x), 1), -torch.inf)
    if bool(by_k.any()):
        k = torch.where(by_k, table[:, TOP_K], 1).long()
        kth = x.topk(int(k.max())).values.gather(1, k[:, None] - 1)
        threshold = torch.where(by_k[:, None], kth, threshold)
    for r in by_p.nonzero()[:, 0].tolist():
        among = x[r] >= threshold[r] if bool(by_k[r]) else slice(None)
        threshold[r] = _nucleus(x[r, among], share[r, among], float(table[r, TOP_P]))
    return (x >= threshold) & ((share >= table[:, MIN_P, None]) | ~sampled[:, None])


def _nucleus(x: Tensor, share: Tensor, top_p: float) -> Tensor:
    """x [V], share [V] → the least x for which the weight of what is strictly above stays under top_p of the total."""
    limit = max(math.ceil(top_p * float(_weight(share).sum())), 1)
    # most nuclei are small and sorting all is dear: sort what is likely enough first, and less likely ones if need be
    for least in (1e-2, 1e-4, 0.0):
        head = share >= least
        values, order = x[head].sort(descending=True)
        weight = _weight(share[head])[order]
        through = weight.cumsum(0)
        if int(through[-1]) >= limit:
            break
    # of equal values the first has above it just what is strictly larger; if that one is kept, so are its equals
    return values[((through - weight) < limit).nonzero()[-1, 0]]


def _weight(share: Tensor) -> Tensor:
    """fp32 in [0, 1] → int64; exact, because scaling by a power of two is."""
    return (share * UNIT).long()


def _draw(weight: Tensor, u: Tensor) -> Tensor:
    """weight int64 [R, V], u fp64 [R] → int64 [R], the first token whose cumulated weight exceeds u · total."""
    cumulated = weight.cumsum_(-1)
    total = cumulated[:, -1:]
    # a whole number exceeds y where it exceeds ⌊y⌋; the product may round up to the total
    passed = torch.minimum((u[:, None] * total.double()).long(), total - 1)
    return torch.searchsorted(cumulated, passed, right=True)[:, 0]


def _largest(x: Tensor, n: int) -> Tensor:
    """The n largest of x [R, V], the first index first among equals → int64 [R, n]."""
    if not n:
        return x.new_empty(len(x), 0, dtype=torch.int64)
    # torch breaks ties as it likes: order what reaches the n-th value by itself
    nth = x.topk(n).values[:, -1:]
    rows = [(row >= least).nonzero()[:, 0] for row, least in zip(x, nth, strict=True)]
    order = [row[at].sort(descending=True, stable=True).indices for at, row in zip(rows, x, strict=True)]
    return torch.stack([at[first[:n]] for at, first in zip(rows, order, strict=True)])


def uniforms(seeds: Tensor, positions: Tensor, count: int = 1) -> Tensor:
    """seeds int64 [R], positions int64 [R] → fp64 [R, count] in [0, 1); see ``accel.kernels.sampling.uniforms``."""
    column = torch.arange(count, device=seeds.device).expand(len(seeds), count)
    position = positions[:, None].expand_as(column)
    counter = (position & 0xFFFFFFFF, position >> 32 & 0xFFFFFFFF, column, torch.zeros_like(column))
    seed = seeds[:, None].expand_as(column)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    # 27 and 26 bits of two words: every multiple of 2^-53 below 1
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words and two key words → four words; int64 tensors that hold 32 bits."""
    (a, b, c, d), (key_0, key_1) = counter, key
    for _ in range(10):
        # an int64 product wraps, and its 64 bits are those of the unsigned one
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = right >> 32 & 0xFFFFFFFF ^ b ^ key_0, right & 0xFFFFFFFF
        c, d = left >> 32 & 0xFFFFFFFF ^ d ^ key_1, left & 0xFFFFFFFF
        key_0, key_1 = key_0 + INCREMENTS[0] & 0xFFFFFFFF, key_1 + INCREMENTS[1] & 0xFFFFFFFF
    return a, b, c, d


NOTHING_TO_CHOOSE = (
    "no token can follow: the logits of a row are all -inf or hold NaN or +inf; allow at least one token in every row"
)
