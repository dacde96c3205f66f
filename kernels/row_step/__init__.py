"""Row step: what a llama-like decoder layer does for a few new tokens of some rows, on a CPU.

Knows products, norms, rotations, slots and lengths. Does not know models, caches or layers. README.md has the shapes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from accel.kernels.native import NotCompiled, library
from accel.kernels.row_step import reference
from accel.kernels.row_step.compiled import Compiled, Stack
from accel.kernels.row_step.reference import Layer, Panels, panels

__all__ = ["Compiled", "Layer", "Panels", "Stack", "attempt", "compiled", "layout", "panels"]

SOURCE = Path(__file__).with_name("cpu.c")
# RMS error over the RMS of the reference that a library may have in its first call
TOLERANCE = 1e-5


def layout(slots: Sequence[int], starts: Sequence[int], positions: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The rows of a step as ``attend`` takes them: int64 ``[R, 5]``.

    Row r lies in slot ``slots[r]``, holds ``starts[r]`` keys, and adds ``counts[r]`` tokens, the first of them at
    position ``positions[r]``. The rows' new tokens lie one row behind the other.
    """
    first, found = 0, []
    for slot, start, position, count in zip(slots, starts, positions, counts, strict=True):
        found.append((slot, start, position, first, count))
        first += count
    return torch.tensor(found)


def compiled(folder: Path) -> Compiled | None:
    """The compiled functions, made on first use and kept in ``folder``; None, with a warning, where there are none."""
    found = attempt(folder)
    if isinstance(found, Compiled):
        return found
    warnings.warn(f"decoding on this CPU goes on without compiled kernels, slower: {found}", stacklevel=2)
    return None


@functools.cache
def attempt(folder: Path) -> Compiled | NotCompiled:
    """The compiled functions, or why there are none; tried once a process."""
    try:
        found = Compiled(library(SOURCE, folder))
        _check(found)
    except NotCompiled as error:
        return error
    return found


def _check(found: Compiled) -> None:
    """A compiler may have made anything of the source: compare once with the reference."""
    generator = torch.Generator().manual_seed(0)
    x, delta, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 96), (3, 96), (96,)))
    stores = [torch.randn(2, 2, 8, 16, generator=generator) for _ in range(2)]
    angles = [torch.randn(8, 16, generator=generator) for _ in range(2)]
    rows = layout([1, 0], [2, 5], [2, 5], [1, 2])
    several = torch.cat([x, delta, weight[None]])
    for name, given in {
        "linear": lambda: (x, panels(several)),
        "linear in 8 bits": lambda: (x, panels(several, in_8_bits=True)),
        "add_norm": lambda: (x.clone(), delta, weight, 1e-5),
        "silu_mul": lambda: (x, delta),
        "attend": lambda: (x, x[:, :32], delta[:, :32], rows, *angles, *(store.clone() for store in stores)),
    }.items():
        more = {"scale": 0.25} if name == "attend" else {}
        function = name.split()[0]
        expected = getattr(reference, function)(*given(), **more)
        error = (getattr(found, function)(*given(), **more) - expected).square().mean() / expected.square().mean()
        if not float(error) <= TOLERANCE**2:
            raise NotCompiled(f"{name} of the compiled library is wrong (another compiler may help: name it with CC)")
