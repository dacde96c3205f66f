"""Cases of the conv_features family: the prologue of linear attention, for a stretch of tokens and for one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Geometry, Goal, Peer, Ready

# of the one-token step, as of every decode-step kernel
STEP_GOALS = (Goal(share=0.8),)
TAPS = 4
# tokens of a prefill that the reference computes
CHECKED_LENGTH = 1024


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if quick:
        yield _case(device, c.TOY, 1, 256, rank=0)
        yield _case(device, c.TOY, 2, 0, rank=1)
        return
    for later, g in enumerate((c.LLAMA_8B, c.LLAMA_1B)):
        for T, rank in ((4_096, 1), (32_768, 0)):
            yield _case(device, g, 1, T, rank + later)
        for R, rank in ((1, 1), (64, 1)):
            yield _case(device, g, R, 0, rank + later)


def _case(device: torch.device, g: Geometry, B: int, T: int, rank: int) -> Case:
    """T tokens of each of B rows; T = 0 is the step of one token with the conv's state."""
    dtype, f = c.working_dtype(device), g.D // 2
    tokens = B * max(T, 1)
    # q, k and gate in; features of both for every head and decays out
    numbers = tokens * (g.H * g.D + 2 * g.Hkv * g.D + 2 * g.H * g.D + g.Hkv * g.D)
    # maps; the state read and, in a step, written
    numbers += 2 * g.H * g.D * f + B * (TAPS - 1) * (g.H + g.Hkv) * g.D * (1 if T else 2)
    return Case(
        "conv_features",
        f"prefill {g.H}/{g.Hkv}/{g.D}, {T:,} tokens" if T else f"step {g.H}/{g.Hkv}/{g.D}, R {B}",
        {"B": B, "T": max(T, 1), "H": g.H, "Hkv": g.Hkv, "D": g.D, "f": f, "W": TAPS, "models": g.models},
        c.dtype_name(dtype),
        bytes=numbers * dtype.itemsize + 2 * g.H * g.D * TAPS * 4,
        # two maps of a head, one product each: the second softmax is of the negated first
        flops=4 * tokens * g.H * g.D * f,
        prepare=partial(_prepare_prefill, device, dtype, g, T) if T else partial(_prepare_step, device, dtype, g, B),
        goals=() if T else STEP_GOALS,
        rank=rank,
    )


def _layer(device: torch.device, dtype: torch.dtype, g: Geometry) -> dict[str, Any]:
    """One layer's maps, in ``dtype``, and taps, fp32."""
    shape = (g.H, g.D, g.D // 2)
    maps = [c.normal(device, *shape, dtype=dtype, scale=g.D**-0.5, seed=s) for s in (10, 11)]
    taps = [c.normal(device, g.H, g.D, TAPS, dtype=torch.float32, scale=0.5, seed=s) for s in (12, 13)]
    return {"q_map": maps[0], "k_map": maps[1], "q_taps": taps[0], "k_taps": taps[1]}


def _tokens(device: torch.device, dtype: torch.dtype, g: Geometry, *shape: int) -> list[Tensor]:
    """Queries, keys and gate logits."""
    return [c.normal(device, *shape, heads, g.D, dtype=dtype, seed=s) for s, heads in enumerate((g.H, g.Hkv, g.Hkv))]


def _wide(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in named.items()}


def _prepare_prefill(device: torch.device, dtype: torch.dtype, g: Geometry, T: int) -> Ready:
    kernels, reference = c.public("conv_features"), c.reference("conv_features")
    layer, tokens = _layer(device, dtype, g), _tokens(device, dtype, g, 1, T)

    def check() -> list[Check]:
        # causal: a part of the tokens gives that part of the result
        got = kernels.conv_features(*tokens, **layer)
        expected = reference.conv_features(*(x[:, :CHECKED_LENGTH].float() for x in tokens), **_wide(layer))
        return [
            c.close(name, getattr(got, name)[:, :CHECKED_LENGTH], getattr(expected, name), c.tolerance(dtype))
            for name in ("q", "k", "log_decay")
        ]

    return Ready(
        lambda: kernels.conv_features(*tokens, **layer),
        check,
        {"torch reference": Peer(lambda: reference.conv_features(*tokens, **layer))},
    )


def _prepare_step(device: torch.device, dtype: torch.dtype, g: Geometry, R: int) -> Ready:
    kernels, reference = c.public("conv_features"), c.reference("conv_features")
    layer, tokens = _layer(device, dtype, g), _tokens(device, dtype, g, R)

    def state(of: torch.dtype) -> Any:
        return kernels.ConvState(*(x.to(of) for x in _tokens(device, dtype, g, R, TAPS - 1)[:2]))

    def check() -> list[Check]:
        got = kernels.conv_features_step(*tokens, **layer, state=state(dtype))
        wide = (x.float() for x in tokens)
        expected = reference.conv_features_step(*wide, **_wide(layer), state=state(torch.float32))
        return [
            c.close(name, ours, theirs, c.tolerance(dtype))
            for name, ours, theirs in zip(("q", "k", "log_decay"), got, expected, strict=True)
        ]

    ours, theirs = state(dtype), state(dtype)
    return Ready(
        lambda: kernels.conv_features_step(*tokens, **layer, state=ours),
        check,
        {"torch reference": Peer(lambda: reference.conv_features_step(*tokens, **layer, state=theirs))},
    )
