"""Cases of the row_step family, which runs on CPUs alone: decoding rows of a small model, and what stands around."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from accel.artifacts.resolve import compiled_folder
from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Geometry, Peer, Ready
from accel.kernels.row_step import Compiled, attempt, layout, panels

SMOLLM2 = Geometry("SmolLM2-135M", 9, 3, 64)
HIDDEN, INTERMEDIATE, VOCABULARY = 576, 1536, 49_152
EPS = 1e-5


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A CPU is what they are for: ``quick`` changes nothing."""
    if device.type != "cpu":
        return
    # the largest weight, which no cache holds
    for rank, N in enumerate((1, 5, 16, 4, 8, 64)):
        yield _linear(N, VOCABULARY, rank)
    for N in (1, 2, 4):
        yield _linear(N, VOCABULARY, rank=1, in_8_bits=True)
    for rank, (R, n, length) in enumerate(((16, 1, 256), (1, 1, 256), (1, 5, 256), (1, 1, 4096), (1, 256, 1024))):
        yield _attend(SMOLLM2, R, n, length, rank)
    for N in (16, 256):
        yield _add_norm(N, rank=1)
        yield _silu_mul(N, rank=1)


def _linear(N: int, outputs: int, rank: int, in_8_bits: bool = False) -> Case:
    return Case(
        "row_step",
        f"linear{' in 8 bits' if in_8_bits else ''}, {N} tokens, {HIDDEN} to {outputs:,}",
        {"N": N, "I": HIDDEN, "O": outputs, "models": SMOLLM2.models},
        "float32",
        bytes=(1 if in_8_bits else 4) * HIDDEN * outputs + 4 * N * (HIDDEN + outputs),
        flops=2 * N * HIDDEN * outputs,
        prepare=partial(_prepare_linear, N, outputs, in_8_bits),
        rank=rank,
    )


def _prepare_linear(N: int, outputs: int, in_8_bits: bool) -> Ready:
    cpu, found = torch.device("cpu"), _compiled()
    x, weight = (c.normal(cpu, n, HIDDEN, dtype=torch.float32, seed=s) for s, n in enumerate((N, outputs)))
    ordered, whole = panels(weight, in_8_bits=in_8_bits), panels(weight)
    expected: torch.Tensor = c.reference("row_step").linear(x, ordered)

    def agrees(out: torch.Tensor) -> Check:
        return c.close("out", out, expected, c.tolerance(torch.float32))

    if in_8_bits:
        # what rounds as much is nobody's; in fp32 it is the same product
        peers = {"fp32": Peer(lambda: found.linear(x, whole))}
        return Ready(lambda: found.linear(x, ordered), lambda: [agrees(found.linear(x, ordered))], peers)
    peers = {"torch F.linear": Peer(lambda: F.linear(x, weight), agrees=agrees)}
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        run = torch.ops.mkldnn._linear_pointwise.default
        peers["oneDNN, packed"] = Peer(lambda: run(x, packed, None, "none", [], ""), agrees=agrees)
    return Ready(lambda: found.linear(x, ordered), lambda: [agrees(found.linear(x, ordered))], peers)


def _attend(g: Geometry, R: int, n: int, length: int, rank: int) -> Case:
    kept = 2 * g.Hkv * g.D * R * (length + n)
    return Case(
        "row_step",
        f"attend {g.H}/{g.Hkv}/{g.D}, R {R}, {n} new behind {length:,}",
        {"R": R, "n": n, "L": length, "H": g.H, "Hkv": g.Hkv, "D": g.D, "models": g.models},
        "float32",
        bytes=4 * (kept + R * n * (2 * g.H + 2 * g.Hkv) * g.D),
        flops=4 * R * n * g.H * g.D * (length + n),
        prepare=partial(_prepare_attend, g, R, n, length),
        rank=rank,
    )


def _prepare_attend(g: Geometry, R: int, n: int, length: int) -> Ready:
    cpu, reference, found = torch.device("cpu"), c.reference("row_step"), _compiled()
    q, k, v = (
        c.normal(cpu, R * n, heads * g.D, dtype=torch.float32, seed=s) for s, heads in enumerate((g.H, g.Hkv, g.Hkv))
    )
    rows = layout(range(R), [length] * R, [length] * R, [n] * R)
    cosine, sine = (c.normal(cpu, length + n, g.D, dtype=torch.float32, seed=s) for s in (3, 4))
    keys, values = (c.normal(cpu, R, g.Hkv, length + n, g.D, dtype=torch.float32, seed=s) for s in (5, 6))

    def run() -> torch.Tensor:
        return found.attend(q, k, v, rows, cosine, sine, keys, values, scale=g.D**-0.5)

    def expected() -> torch.Tensor:
        result: torch.Tensor = reference.attend(q, k, v, rows, cosine, sine, keys, values, scale=g.D**-0.5)
        return result

    def check() -> list[Check]:
        return [c.close("out", run(), expected(), c.tolerance(torch.float32))]

    return Ready(run, check, {"torch, row by row": Peer(expected)})


def _add_norm(N: int, rank: int) -> Case:
    return _between("add_norm", N, HIDDEN, numbers=2 * N * HIDDEN, rank=rank)


def _silu_mul(N: int, rank: int) -> Case:
    return _between("silu_mul", N, INTERMEDIATE, numbers=3 * N * INTERMEDIATE, rank=rank)


def _between(name: str, N: int, width: int, numbers: int, rank: int) -> Case:
    return Case(
        "row_step",
        f"{name}, {N} tokens of {width:,}",
        {"N": N, "width": width, "models": SMOLLM2.models},
        "float32",
        bytes=4 * numbers,
        flops=0,
        prepare=partial(_prepare_between, name, N, width),
        rank=rank,
    )


def _prepare_between(name: str, N: int, width: int) -> Ready:
    cpu, reference, found = torch.device("cpu"), c.reference("row_step"), _compiled()
    x, y = (c.normal(cpu, N, width, dtype=torch.float32, seed=s) for s in (0, 1))
    given = (x, None, y[0].clone(), EPS) if name == "add_norm" else (x, y)

    def check() -> list[Check]:
        return [c.close(name, getattr(found, name)(*given), getattr(reference, name)(*given), c.tolerance(x.dtype))]

    return Ready(
        lambda: getattr(found, name)(*given),
        check,
        {"torch reference": Peer(lambda: getattr(reference, name)(*given))},
    )


def _compiled() -> Compiled:
    found = attempt(compiled_folder())
    if not isinstance(found, Compiled):
        raise found
    return found
