"""What this machine can do at most, measured in the run whose figures are held against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from accel.bench.kernels.cases import Thunk, dtype_name, normal, working_dtype
from accel.bench.kernels.timing import Clock

# bytes of the tensor that is copied and the side of the square matrices; a GPU's L2 is some 50 MB
SIZES = {"cuda": (2 << 30, 8192), "cpu": (64 << 20, 1024)}


@dataclass(frozen=True)
class Ceilings:
    """``copy_gb_s`` counts bytes read and written; ``launch_ms`` is the time of a kernel that does next to nothing."""

    copy_gb_s: float
    matmul_tflop_s: float
    matmul_dtype: str
    launch_ms: float

    def floor_ms(self, bytes: int, flops: int) -> float:
        """No run is much faster: the bytes at the copy's rate, or the products at the matmul's, whichever is longer."""
        return max(bytes / self.copy_gb_s / 1e6, flops / self.matmul_tflop_s / 1e9)

    def bound(self, bytes: int, flops: int) -> str:
        """What sets the floor, "copy" or "matmul"; "launch" where one empty launch takes longer than the floor."""
        if self.floor_ms(bytes, flops) < self.launch_ms:
            return "launch"
        return "copy" if bytes / self.copy_gb_s / 1e6 >= flops / self.matmul_tflop_s / 1e9 else "matmul"

    def document(self) -> dict[str, Any]:
        return asdict(self)


def measure(clock: Clock, sizes: tuple[int, int] | None = None) -> Ceilings:
    """Copy bandwidth, matmul rate on random data and the time of a launch, each a median over repetitions."""
    device, dtype = clock.device, working_dtype(clock.device)
    copied, side = sizes or SIZES["cuda" if clock.on_gpu else "cpu"]
    source = normal(device, copied // 4, dtype=torch.float32)
    copy_ms = _median_ms(clock, partial(torch.empty_like(source).copy_, source))
    launch_ms = _median_ms(clock, partial(source[:1].clone().add_, 1))
    del source
    a, b = (normal(device, side, side, dtype=dtype, seed=seed) for seed in (0, 1))
    matmul_ms = _median_ms(clock, partial(torch.matmul, a, b))
    return Ceilings(2 * (copied // 4) * 4 / copy_ms / 1e6, 2 * side**3 / matmul_ms / 1e9, dtype_name(dtype), launch_ms)


def _median_ms(clock: Clock, run: Thunk) -> float:
    for _ in range(3):  # the first products raise a GPU's clocks
        clock.first_call(run)
    return clock.race({"": run})[""].median
