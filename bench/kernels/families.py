"""Which families are measured, on which device, and their cases."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from accel.bench.kernels.cases import Case
from accel.errors import OptionError

FAMILIES = (
    "verify",
    "sampling",
    "unmask",
    "prefix_attention",
    "linear_attention",
    "conv_features",
    "similarity",
    "row_step",
)


def choose(families: str | None) -> tuple[str, ...]:
    """Families of a comma-separated list, in the suite's order; all of them for None."""
    if families is None:
        return FAMILIES
    names = [name.strip() for name in families.split(",") if name.strip()]
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        raise OptionError(f"no kernel family {', '.join(unknown) or families!r}: choose from {', '.join(FAMILIES)}")
    return tuple(family for family in FAMILIES if family in names)


def find_device(name: str) -> torch.device:
    """The device of an option: "auto" takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device={name!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device={name!r}: the kernels are measured on cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device


def gather(families: Sequence[str], device: torch.device, quick: bool) -> list[Case]:
    """The families' cases, those of the lowest rank first; within a rank the families keep their order."""
    found: list[Case] = []
    for family in families:
        found += import_module(f"accel.bench.kernels.{family}").cases(device, quick)
    return sorted(found, key=lambda case: case.rank)
