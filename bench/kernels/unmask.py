"""Cases of the unmask family: certainty of a block of masked positions, and the commit rule."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Goal, Peer, Ready

GOALS = (Goal(share=0.8),)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    dtype, V = c.working_dtype(device), 4_096 if quick else c.LLADA_VOCABULARY
    for rank, N in enumerate((4, 32) if quick else (256, 32)):
        yield Case(
            "unmask",
            f"certainty, {N} positions, V {V:,}",
            {"N": N, "V": V},
            c.dtype_name(dtype),
            bytes=N * V * dtype.itemsize + N * (8 + 4 + 4),
            flops=0,
            prepare=partial(_certainty, device, dtype, N, V),
            goals=GOALS,
            rank=rank,
        )
    for rank, (B, L) in enumerate([(1, 32)] if quick else [(1, 32), (16, 256)], start=1):
        yield Case(
            "unmask",
            f"commit by entropy, {B} x {L} positions",
            {"B": B, "L": L},
            "fp32",
            # entropy, mask, result
            bytes=B * L * (4 + 1 + 1),
            flops=0,
            prepare=partial(_commit, device, B, L),
            rank=rank,
        )


def _certainty(device: torch.device, dtype: torch.dtype, N: int, V: int) -> Ready:
    logits = c.normal(device, N, V, dtype=dtype, scale=3.0)
    kernels, reference = c.public("unmask"), c.reference("unmask")

    def check() -> list[Check]:
        got, expected = kernels.certainty(logits), reference.certainty(logits.float())
        return [
            c.equal("token", got.token, expected.token),
            c.close("probability", got.probability, expected.probability, 1e-5),
            c.close("entropy", got.entropy, expected.entropy, 1e-5),
        ]

    def torch_softmax() -> object:
        p = torch.softmax(logits, -1, dtype=torch.float32)
        return *p.max(-1), torch.special.entr(p).sum(-1)

    return Ready(lambda: kernels.certainty(logits), check, {"torch softmax": Peer(torch_softmax)})


def _commit(device: torch.device, B: int, L: int) -> Ready:
    kernels, reference = c.public("unmask"), c.reference("unmask")
    entropy = c.normal(device, B, L, dtype=torch.float32).abs()
    masked = c.normal(device, B, L, dtype=torch.float32, seed=1) > 0
    certainty = kernels.Certainty(torch.zeros(B, L, dtype=torch.int64, device=device), entropy, entropy)
    rule = {"rule": "entropy", "threshold": 0.5}

    def check() -> list[Check]:
        got, expected = kernels.commit(certainty, masked, **rule), reference.commit(certainty, masked, **rule)
        return [c.equal("commit", got, expected)]

    return Ready(
        lambda: kernels.commit(certainty, masked, **rule),
        check,
        {"torch reference": Peer(lambda: reference.commit(certainty, masked, **rule))},
    )
