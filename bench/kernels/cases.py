"""What a case is: known traffic and work, a way to make its inputs when its turn comes, a check, peers and goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Geometry:
    """The attention heads of a model, or of models that share them."""

    models: str
    H: int
    Hkv: int
    D: int


LLAMA_1B = Geometry("Llama-3.2-1B", 32, 8, 64)
LLAMA_8B = Geometry("Llama-3.1-8B, Mistral-7B", 32, 8, 128)
# small enough for a CPU's references
TOY = Geometry("toy", 4, 2, 64)

LLAMA_3_VOCABULARY = 128_256
MISTRAL_VOCABULARY = 32_768
LLADA_VOCABULARY = 126_464


@dataclass(frozen=True)
class Check:
    """How far one result is from the reference's: ``error`` may be at most ``allowed``; None where it is no number."""

    what: str
    error: float | None
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same work: ``run``, or the ``reason`` why there is none to run.

    ``agrees`` holds its result against ours, where the two compute the same numbers.
    """

    run: Thunk | None
    reason: str = ""
    agrees: Callable[[Any], Check] | None = None


@dataclass
class Ready:
    """A case with its inputs in memory. ``check`` runs the kernel anew; nothing here is timed yet."""

    run: Thunk
    check: Callable[[], Sequence[Check]]
    peers: Mapping[str, Peer] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """``share`` of the floor at least, or ``ratio`` times as fast as every measured peer whose name begins so."""

    share: float | None = None
    peer: str | None = None
    ratio: float = 1.0

    @property
    def text(self) -> str:
        if self.peer is None:
            return f"share ≥ {self.share:.2f}"
        return f"≥ {self.ratio:g}x {self.peer}"

    def verdict(self, share: float, ratios: Mapping[str, float]) -> str:
        """Whether it is "met" or "not met"; "open" where no peer of that name was measured."""
        if self.peer is None:
            assert self.share is not None
            return "met" if share >= self.share else "not met"
        rivals = [ratio for name, ratio in ratios.items() if name.startswith(self.peer)]
        return "open" if not rivals else "met" if min(rivals) >= self.ratio else "not met"


@dataclass(frozen=True)
class Case:
    """``bytes``: the inputs read once and the outputs written once; ``flops``: what must be computed of products.

    ``prepare`` allocates, so it is called when the case's turn comes. Cases of a low ``rank`` are measured first.
    """

    family: str
    name: str
    shape: Mapping[str, Any]
    dtype: str
    bytes: int
    flops: int
    prepare: Callable[[], Ready]
    goals: Sequence[Goal] = ()
    rank: int = 1


def public(family: str) -> ModuleType:
    """The family's public functions; imported by name, so that one family's fault is that family's alone."""
    return import_module(f"accel.kernels.{family}")


def reference(family: str) -> ModuleType:
    """The family's plain statement in PyTorch."""
    return import_module(f"accel.kernels.{family}.reference")


def close(what: str, actual: Tensor, expected: Tensor, allowed: float) -> Check:
    """RMS of the error over RMS of the expected values, in fp64; None where the result is not finite."""
    if actual.shape != expected.shape:
        raise ValueError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    a, e = actual.double(), expected.double()
    ratio = ((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item()
    return Check(what, ratio if a.isfinite().all().item() else None, allowed)


def equal(what: str, actual: Tensor, expected: Tensor, allowed: float = 0.0) -> Check:
    """The share of integers that differ."""
    if actual.shape != expected.shape:
        raise ValueError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    return Check(what, (actual != expected).double().mean().item(), allowed)


def tolerance(dtype: torch.dtype) -> float:
    """What rounding allows: fp32 sums in another order, or operands and results of 8 (bf16) and 11 bits (fp16)."""
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)


def working_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def normal(device: torch.device, *shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, drawn where they are used: never zeros, which can run faster than real data."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
    return drawn if scale == 1.0 else drawn.mul_(scale)
