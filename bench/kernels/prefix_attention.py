"""Cases of the prefix_attention family: decode over tails and shared segments, and prefill, beside SDPA, flash-attn.

The peers know no shared segments: they read one tensor a row that already holds segment and tail, copied together
off the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels import peers
from accel.bench.kernels.cases import Case, Check, Geometry, Goal, Ready

GOALS = (Goal(share=0.75), Goal(peer="sdpa"))
# positions at either end of a prefill that the reference computes: it has no tiles
CHECKED_LENGTH = 256
# two results in bf16, each within the rounding of the exact one
PEERS_MAY_DIFFER = 2e-2
# keys of the tail that follows a shared segment
TAIL = 128


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if quick:
        yield _decode(device, c.TOY, 1, 256, 0, 0, rank=0)
        yield _decode(device, c.TOY, 4, 32, 256, 1, rank=0)
        yield _decode(device, c.TOY, 4, 32, 128, 2, rank=1)
        yield _prefill(device, c.TOY, 256, rank=0)
        return
    for later, g in enumerate((c.LLAMA_8B, c.LLAMA_1B)):
        for R, L, rank in ((1, 4_096, 1), (1, 32_768, 0), (1, 131_072, 1), (16, 4_096, 0), (16, 16_384, 1),
                           (64, 1_024, 1), (64, 4_096, 1)):  # fmt: skip
            yield _decode(device, g, R, L, 0, 0, rank + later)
        for R, P, segments, rank in ((16, 4_096, 1, 0), (16, 16_384, 1, 1), (64, 4_096, 1, 1), (64, 16_384, 1, 1),
                                     (64, 4_096, 4, 0), (16, 16_384, 4, 1)):  # fmt: skip
            yield _decode(device, g, R, TAIL, P, segments, rank + later)
        for T, rank in ((4_096, 0), (16_384, 1)):
            yield _prefill(device, g, T, rank + later)


def _decode(device: torch.device, g: Geometry, R: int, L: int, P: int, segments: int, rank: int) -> Case:
    """R rows of one new position over L tail keys and, where there are ``segments``, one of them of P keys."""
    dtype = c.working_dtype(device)
    # keys and values: tails and each segment once; queries and results
    numbers = 2 * g.Hkv * g.D * (R * L + segments * P) + 2 * R * g.H * g.D
    shared = f" + {segments} shared segment{'s' * (segments > 1)} of {P:,}" if segments else ""
    return Case(
        "prefix_attention",
        f"decode {g.H}/{g.Hkv}/{g.D}, R {R}, own {L:,}{shared}",
        {"R": R, "H": g.H, "Hkv": g.Hkv, "D": g.D, "n": 1, "L": L, "P": P, "segments": segments, "models": g.models},
        c.dtype_name(dtype),
        bytes=numbers * dtype.itemsize,
        flops=4 * R * g.H * g.D * (L + P),
        prepare=partial(_prepare_decode, device, dtype, g, R, L, P, segments),
        goals=GOALS,
        rank=rank,
    )


def _prepare_decode(
    device: torch.device, dtype: torch.dtype, g: Geometry, R: int, L: int, P: int, segments: int
) -> Ready:
    kernels, reference = c.public("prefix_attention"), c.reference("prefix_attention")
    query = c.normal(device, R, g.H, 1, g.D, dtype=dtype)
    keys, values = (c.normal(device, R, g.Hkv, L, g.D, dtype=dtype, seed=s) for s in (1, 2))
    shared = [
        kernels.SharedKV(
            *(c.normal(device, g.Hkv, P, g.D, dtype=dtype, seed=10 + 2 * i + s) for s in (0, 1)),
            rows=tuple(range(R * i // segments, R * (i + 1) // segments)),
            first_position=0,
        )
        for i in range(segments)
    ]
    scale = g.D**-0.5
    step = kernels.plan([L - 1] * R, 1, [P] * R, window=None, device=device, dtype=dtype)

    def run() -> Tensor:
        return kernels.prefix_attention(query, keys, values, step, shared, scale=scale)

    def check() -> list[Check]:
        wide = [reference.SharedKV(s.keys.float(), s.values.float(), s.rows, s.first_position) for s in shared]
        told = reference.plan([L - 1] * R, 1, [P] * R, window=None, device=device, dtype=torch.float32)
        expected = reference.prefix_attention(query.float(), keys.float(), values.float(), told, wide, scale=scale)
        return [c.close("output", run(), expected, c.tolerance(dtype))]

    whole_keys, whole_values = keys, values
    if shared:
        whole_keys = torch.cat([torch.cat([s.keys.expand(len(s.rows), -1, -1, -1) for s in shared]), keys], 2)
        whole_values = torch.cat([torch.cat([s.values.expand(len(s.rows), -1, -1, -1) for s in shared]), values], 2)
    whole = (query, whole_keys, whole_values)
    found = {
        "sdpa": peers.sdpa(*whole, causal=False, scale=scale),
        "sdpa folded": peers.sdpa_folded(*whole, scale=scale),
        "flash-attn": peers.flash_attn_cache(*whole, scale=scale),
    }
    return Ready(run, check, peers.compared(found, run, PEERS_MAY_DIFFER))


def _prefill(device: torch.device, g: Geometry, T: int, rank: int) -> Case:
    dtype = c.working_dtype(device)
    return Case(
        "prefix_attention",
        f"prefill {g.H}/{g.Hkv}/{g.D}, {T:,} positions",
        {"R": 1, "H": g.H, "Hkv": g.Hkv, "D": g.D, "n": T, "L": T, "models": g.models},
        c.dtype_name(dtype),
        bytes=2 * T * (g.H + g.Hkv) * g.D * dtype.itemsize,
        # the causal half of two products
        flops=2 * T * T * g.H * g.D,
        prepare=partial(_prepare_prefill, device, dtype, g, T),
        goals=GOALS,
        rank=rank,
    )


def _prepare_prefill(device: torch.device, dtype: torch.dtype, g: Geometry, T: int) -> Ready:
    kernels, reference = c.public("prefix_attention"), c.reference("prefix_attention")
    query = c.normal(device, 1, g.H, T, g.D, dtype=dtype)
    keys, values = (c.normal(device, 1, g.Hkv, T, g.D, dtype=dtype, seed=s) for s in (1, 2))
    scale = g.D**-0.5

    step = kernels.plan([0], T, [0], window=None, device=device, dtype=dtype)

    def run() -> Tensor:
        return kernels.prefix_attention(query, keys, values, step, scale=scale)

    def check() -> list[Check]:
        got, few = run(), min(T, CHECKED_LENGTH)
        # the first positions see nothing of the later ones; the last ones are a step over a tail of T keys
        first = reference.plan([0], few, [0], window=None, device=device, dtype=torch.float32)
        last = reference.plan([T - few], few, [0], window=None, device=device, dtype=torch.float32)
        ends = {
            f"first {few:,}": (first, slice(0, few), slice(0, few)),
            f"last {few:,}": (last, slice(T - few, T), slice(0, T)),
        }
        return [
            c.close(
                what,
                got[:, :, rows],
                reference.prefix_attention(
                    query[:, :, rows].float(),
                    keys[:, :, seen].float(),
                    values[:, :, seen].float(),
                    told,
                    scale=scale,
                ),
                c.tolerance(dtype),
            )
            for what, (told, rows, seen) in ends.items()
        ]

    found = {
        "sdpa": peers.sdpa(query, keys, values, causal=True, scale=scale),
        "flash-attn": peers.flash_attn(query, keys, values, causal=True, scale=scale),
    }
    return Ready(run, check, peers.compared(found, run, PEERS_MAY_DIFFER))
