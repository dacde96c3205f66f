"""A toy denoiser whose logits are a closed form, and the dparallel decoder run by the engine over it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from accel.engine.loop import Engine
from accel.engine.stopping import CriteriaStopper, end_tokens
from accel.methods.dparallel.decoder import DParallelDecoder
from accel.methods.dparallel.options import DParallelOptions
from accel.models.diffusion import DiffusionFacts
from accel.sampling import LogitsPipeline
from accel.types import Request, Stats

VOCAB, MASK = 11, 10


class ToyCache:
    """What the first layer said of every position when a row's block began, and where that still holds."""

    def __init__(self, before: list[Tensor], start: list[int], stop: list[int]) -> None:
        self.before, self.start, self.stop = before, start, stop

    def nbytes(self) -> int:
        return sum(8 * len(row) for row in self.before)

    def select(self, rows: list[int]) -> ToyCache:
        return ToyCache(*([part[i] for i in rows] for part in (self.before, self.start, self.stop)))

    @staticmethod
    def join(caches: list[ToyCache]) -> ToyCache:
        parts = ("before", "start", "stop")
        return ToyCache(*([each for cache in caches for each in getattr(cache, part)] for part in parts))


class ToyDenoiser:
    """Two layers in fp64, h = tanh(W · A[tokens]) and logits = bias + W · h · B, with weights W[p, j] by distance.

    Every position sees every other one, and through h what that one sees: a cache keeps h.
    """

    supports_cache = True
    vocab_size = VOCAB

    def __init__(self, facts: DiffusionFacts, *, seed: int, peak: float, max_positions: int | None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.facts, self.max_positions = facts, max_positions
        self.device = torch.device("cpu")
        self.first = 4 * torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
        self.first[MASK] = 0.0  # a mask says nothing
        self.second = peak * torch.randn(8, VOCAB, generator=generator, dtype=torch.float64)
        self.bias = 1.5 * torch.randn(200, VOCAB, generator=generator, dtype=torch.float64)
        # (how, number of rows, positions asked of each) of every forward
        self.calls: list[tuple[str, int, list[int]]] = []
        self.duals: set[bool] = set()

    def logits(self, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(("whole", len(rows), [len(positions) for positions in at]))
        return [self.of(row)[positions] for row, positions in zip(rows, at, strict=True)]

    def open(
        self, rows: Sequence[Tensor], start: Sequence[int], stop: Sequence[int], *, dual: bool
    ) -> tuple[ToyCache, list[Tensor]]:
        self.calls.append(("open", len(rows), [b - a for a, b in zip(start, stop, strict=True)]))
        self.duals.add(dual)
        again = list(stop) if dual else [len(row) for row in rows]
        said = [self.of(row)[a:b] for row, a, b in zip(rows, start, stop, strict=True)]
        return ToyCache([self.hidden(row) for row in rows], list(start), again), said

    def logits_cached(self, cache: ToyCache, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(("cached", len(rows), [len(positions) for positions in at]))
        said = []
        for i, (row, positions) in enumerate(zip(rows, at, strict=True)):
            hidden, again = cache.before[i].clone(), slice(cache.start[i], cache.stop[i])
            hidden[again] = self.hidden(row)[again]
            said.append(self.out(hidden)[positions])
        return said

    def of(self, row: Tensor) -> Tensor:
        """[T] → [T, V]."""
        return self.out(self.hidden(row))

    def hidden(self, row: Tensor) -> Tensor:
        return (self.weights(len(row)) @ self.first[row]).tanh()

    def out(self, hidden: Tensor) -> Tensor:
        return self.bias[: len(hidden)] + self.weights(len(hidden)) @ hidden @ self.second

    def weights(self, length: int) -> Tensor:
        place = torch.arange(length)
        distance = (place[None, :] - place[:, None]).double()  # [p, j]
        weights = torch.exp(-distance.abs() / 2) * (1 + 0.3 * distance.sign())
        return weights / weights.sum(-1, keepdim=True)


def facts(**changes: Any) -> DiffusionFacts:
    return DiffusionFacts(**{"mask_token": MASK, "block_length": 4} | changes)


def denoiser(seed: int = 0, peak: float = 2.2, max_positions: int | None = None, **changes: Any) -> ToyDenoiser:
    return ToyDenoiser(facts(**changes), seed=seed, peak=peak, max_positions=max_positions)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    """``count`` prompts of 3, 5, 7, 4, 6, … tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, MASK, (3 + 2 * i % 5,), generator=generator).tolist() for i in range(count)]


def run(
    denoiser: Any,
    options: dict[str, Any],
    prompts: list[list[int]],
    max_new: int,
    *,
    max_rows: int | None = None,
    eos: int | None = None,
    seeds: Sequence[int] | None = None,
    **changes: Any,
) -> SimpleNamespace:
    """All prompts through the engine → the new tokens and prompts of each, the stats, and the chunks as they came.

    ``changes`` are fields of the requests.
    """
    stats = Stats()
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    criteria: list[Any] = [MaxLengthCriteria(width + max_new)]
    criteria += [EosTokenCriteria(torch.tensor([eos]))] if eos is not None else []
    requests = [
        Request(
            id=i,
            prompt=torch.tensor(prompt),
            max_new_tokens=max_new,
            history=padded[i],
            seed=100 + i if seeds is None else seeds[i],
            stop_tokens=end_tokens(criteria),
            **{"pipeline": LogitsPipeline()} | changes,
        )
        for i, prompt in enumerate(prompts)
    ]
    decoder = DParallelDecoder(denoiser, DParallelOptions(**options), stats)
    engine = Engine(decoder, CriteriaStopper(criteria, padded, max_new), max_rows=max_rows)
    chunks = list(engine.answer(requests))
    new = [[t for c in chunks if c.request_id == i for t in c.tokens] for i in range(len(prompts))]
    filled = [next((c.prompt for c in chunks if c.request_id == i and c.prompt), p) for i, p in enumerate(prompts)]
    stats.generated_tokens = sum(map(len, new))
    assert not decoder.live and not decoder._inside and decoder._cache is None
    return SimpleNamespace(new=new, prompts=filled, stats=stats, chunks=chunks, calls=denoiser.calls)
