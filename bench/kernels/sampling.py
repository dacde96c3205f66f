"""Cases of the sampling family: a seeded draw from logits, plain and filtered, beside transformers' way in torch.

The filters need several looks at a row, which an L2 may serve; the floor counts one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Goal, Peer, Ready

GOALS = (Goal(share=0.8),)
# sums in another order move a draw only where a uniform falls between two tokens: about one row in a hundred
DRAWS_MAY_DIFFER = 0.05
CHECKED_ROWS = 64

RULES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    V = 4_096 if quick else c.LLAMA_3_VOCABULARY
    rows = (1, 4) if quick else (1, 8, 64, 512)
    for R in rows:
        yield _case(device, "temperature", R, V, rank=0 if rows[-1] == R else 1)
    for rule in list(RULES)[1:]:
        yield _case(device, rule, rows[1] if quick else 64, V, rank=1)
    if not quick:
        yield _case(device, "top-k 50, top-p 0.95", 1, V, rank=2)
        yield _case(device, "top-k 50, top-p 0.95", 512, V, rank=2)
        yield _case(device, "temperature", 64, c.MISTRAL_VOCABULARY, rank=2)


def _case(device: torch.device, rule: str, R: int, V: int, rank: int) -> Case:
    dtype = c.working_dtype(device)
    return Case(
        "sampling",
        f"{rule}, R {R}, V {V:,}",
        {"R": R, "V": V, **RULES[rule]},
        c.dtype_name(dtype),
        # logits; the uniform, the token and its log-probability
        bytes=R * V * dtype.itemsize + R * (8 + 8 + 4),
        flops=0,
        prepare=partial(_prepare, device, dtype, rule, R, V),
        goals=GOALS,
        rank=rank,
    )


def _inputs(device: torch.device, dtype: torch.dtype, R: int, V: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    uniforms = torch.rand(R, generator=generator, device=device, dtype=torch.float64)
    return c.normal(device, R, V, dtype=dtype, scale=3.0), uniforms


def _prepare(device: torch.device, dtype: torch.dtype, rule: str, R: int, V: int) -> Ready:
    kernels, reference = c.public("sampling"), c.reference("sampling")
    options, settings = RULES[rule], kernels.Settings(**RULES[rule])
    logits, uniforms = _inputs(device, dtype, R, V)

    def check() -> list[Check]:
        wide, draws = _inputs(device, dtype, max(R, CHECKED_ROWS), V)
        wide, draws = wide[:CHECKED_ROWS], draws[:CHECKED_ROWS]
        got = kernels.sample(wide, settings, uniforms=draws)
        expected = reference.sample(wide.float(), settings, uniforms=draws)
        same = got.token == expected.token
        return [
            c.equal("token", got.token, expected.token, DRAWS_MAY_DIFFER),
            c.close("logprob of the same tokens", got.logprob[same], expected.logprob[same], 1e-5),
        ]

    return Ready(
        lambda: kernels.sample(logits, settings, uniforms=uniforms),
        check,
        {"torch": Peer(lambda: torch_sample(logits, **options))},
    )


def torch_sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [R, V] → token and its log-probability [R]: each filter a pass of its own, then torch.multinomial's rule.

    In transformers' order: temperature, top-k, top-p (by a full sort), min-p. Nothing waits for the device.
    """
    x = logits.float() / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = x.sort(descending=False)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[:, -1] = False
        x = x.masked_fill(tail.scatter(1, index, tail), -torch.inf)
    if min_p is not None:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    log_p = x.log_softmax(-1)
    # the token with the largest p / Exp(1) is a draw from p
    token = (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1)
    return token, log_p.gather(1, token[:, None])[:, 0]
