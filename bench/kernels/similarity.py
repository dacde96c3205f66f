"""Cases of the similarity family: the k nearest demonstrations of a store, beside the full score matrix in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Peer, Ready

# the width of small sentence encoders, and demonstrations put into a prompt
D, NEAREST = 384, 8
# neighbours whose scores lie within a rounding of each other may change places
MAY_DIFFER = 0.01


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(1, 1_000_000, 0), (32, 1_000_000, 0), (1, 10_000, 1), (32, 10_000, 1)]
    if quick:
        sizes = [(1, 2_000, 0), (8, 2_000, 1)]
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        for Q, N, rank in sizes:
            yield Case(
                "similarity",
                f"top {NEAREST} of {N:,} x {D}, Q {Q}",
                {"Q": Q, "N": N, "D": D, "k": NEAREST},
                c.dtype_name(dtype),
                bytes=(N + Q) * D * dtype.itemsize + Q * NEAREST * (4 + 8),
                flops=2 * Q * N * D,
                prepare=partial(_prepare, device, dtype, Q, N),
                rank=rank + (dtype != torch.float32),
            )


def _prepare(device: torch.device, dtype: torch.dtype, Q: int, N: int) -> Ready:
    kernels, reference = c.public("similarity"), c.reference("similarity")
    queries, store = (
        torch.nn.functional.normalize(c.normal(device, rows, D, dtype=dtype, seed=s), dim=-1)
        for s, rows in enumerate((Q, N))
    )

    def check() -> list[Check]:
        got, expected = (
            kernels.top_k(queries, store, NEAREST, normalized=True),
            reference.top_k(queries.float(), store.float(), NEAREST, normalized=True),
        )
        return [
            c.equal("index", got.indices, expected.indices, MAY_DIFFER if dtype == torch.float32 else 0.1),
            c.close("score", got.scores, expected.scores, c.tolerance(dtype)),
        ]

    def full() -> tuple[Tensor, Tensor]:
        scores, index = (queries @ store.T).topk(NEAREST)
        return scores, index

    return Ready(
        lambda: kernels.top_k(queries, store, NEAREST, normalized=True), check, {"torch full scores": Peer(full)}
    )
