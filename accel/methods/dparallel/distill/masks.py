"""Which tokens of an answer are hidden, and which of these are learned.

Knows positions and chance. Every mask is a function of its generator, and a generator of (seed, step, row), so that a
run that was killed sees what it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.errors import OptionError, unknown_name

# "blocks": what decoding from left to right sees (dParallel's LLaDA); "response": half of everything (its Dream);
# "diffusion": a random share of everything, weighted as the bound asks (masked diffusion, arXiv 2406.07524); "maskgit":
# the same, every hidden token counting alike (arXiv 2202.04200): fewer steps to a model that can answer; "block": that
# share of one block alone, with what decoding sees around it
NOISES = ("blocks", "response", "diffusion", "maskgit", "block")


@dataclass(frozen=True, eq=False)
class Noise:
    """The views of one canvas of C positions that a step shows, V of them.

    ``hidden`` bool [V, C]: the positions that hold the mask token. ``learned`` bool [V, C]: those of them whose tokens
    are learned. ``weight``: what the loss of a learned token counts. ``tokens``: of how many tokens the weighted sum of
    losses stands for, all views together.
    """

    hidden: Tensor
    learned: Tensor
    weight: float
    tokens: int


def generator(seed: int, step: int, row: int) -> torch.Generator:
    """The chance of one row in one step."""
    # the engine is seeded with 32 bits: odd factors spread neighbours over them
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_003 + row) % 2**32)


def blocks(length: int, canvas: int, block_length: int, chance: torch.Generator, share: float = 0.5) -> Noise:
    """One block of the answer as decoding meets it: clean before it, all masks behind it, half of it hidden.

    The other half is hidden in a second view, so that every token of the block is learned once (arXiv 2509.26488).
    ``length``: tokens up to the answer's end, at least 1: decoding enters no block behind it. ``canvas``: positions,
    a multiple of ``block_length``.
    """
    inside, behind = _decoded(length, canvas, block_length, chance)
    learned = _halves(inside, chance, share)
    return Noise(learned | behind, learned, 1.0, int(learned.sum()))


def block(length: int, canvas: int, block_length: int, time: float, chance: torch.Generator) -> Noise:
    """As ``blocks``, but each position of the block hidden with probability ``time``, and one view.

    Decoding comes through all shares, from a block of masks to a single one.
    """
    inside, behind = _decoded(length, canvas, block_length, chance)
    learned = (inside & (torch.rand(canvas, generator=chance) < time))[None]
    return Noise(learned | behind, learned, 1.0, int(learned.sum()))


def response(canvas: int, chance: torch.Generator, share: float = 0.5) -> Noise:
    """A random half of the canvas hidden, and the other half in a second view."""
    learned = _halves(torch.ones(canvas, dtype=torch.bool), chance, share)
    return Noise(learned, learned, 1.0, canvas)


def diffusion(canvas: int, time: float, chance: torch.Generator) -> Noise:
    """Every position hidden with probability ``time``, weighted by 1 / ``time``: an unbiased bound on −ln p.

    A view in which nothing is hidden is a view too: leaving it out would bias the bound.
    """
    assert 0 < time <= 1
    hidden = (torch.rand(canvas, generator=chance) < time)[None]
    return Noise(hidden, hidden, 1.0 / time, canvas)


def maskgit(canvas: int, time: float, chance: torch.Generator) -> Noise:
    """Every position hidden with probability ``time``, unweighted: what is foretold from little weighs most."""
    hidden = diffusion(canvas, time, chance).hidden
    return Noise(hidden, hidden, 1.0, int(hidden.sum()))


def times(rows: int, eps: float, seed: int, step: int) -> list[float]:
    """A time in [eps, 1) for each row of a batch: uniform each, and spread evenly together, which lowers the variance
    of the batch's loss."""
    first = float(torch.rand((), generator=generator(seed, step, -1)))
    return [eps + (1 - eps) * ((first + row / rows) % 1.0) for row in range(rows)]


def check(name: str) -> None:
    """OptionError for an unknown kind of noise."""
    if name not in NOISES:
        raise OptionError(unknown_name("noise", name, NOISES))


def _decoded(length: int, canvas: int, block_length: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """bool [C] each: a block that an answer of ``length`` tokens reaches, any of them alike, and all behind it."""
    assert 1 <= length <= canvas and canvas % block_length == 0
    start = block_length * int(torch.randint(-(-length // block_length), (), generator=chance))
    places = torch.arange(canvas)
    return (places >= start) & (places < start + block_length), places >= start + block_length


def _halves(where: Tensor, chance: torch.Generator, share: float) -> Tensor:
    """bool [C] → bool [V, C]: each position of ``where`` in one of two views; a view without any is left out."""
    first = torch.rand(len(where), generator=chance) < share
    both = torch.stack([where & first, where & ~first])
    return both[both.any(-1)]
