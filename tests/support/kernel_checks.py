"""What the kernel tests share: where kernels run, how far a result may be off, outputs that were never written.

Without a GPU, kernels run under Triton's interpreter on the CPU (tests/conftest.py switches it on before triton is
imported); with one they are compiled and run on it. The tests are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the expected values, in fp64; infinite where a value is NaN or wrongly infinite."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    infinite = e.isinf()
    if not torch.equal(a[infinite], e[infinite]) or not a[~infinite].isfinite().all():
        return float("inf")
    a, e = a[~infinite], e[~infinite]
    if not e.numel():
        return 0.0
    error = (a - e).square().mean().sqrt().item()
    return error / max(e.square().mean().sqrt().item(), 1e-30) if error else 0.0


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "result") -> None:
    """Fail where the RMS error is more than ``tolerance`` of the expected RMS (fp32 sums in another order: 1e-5)."""
    ratio = rms_ratio(actual, expected)
    assert ratio <= tolerance, f"{what}: RMS error is {ratio:.3g} of RMS, allowed {tolerance:.3g}"


def assert_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Fail where integers differ."""
    a, e = actual.cpu(), expected.cpu()
    assert a.shape == e.shape, f"{what}: shape {list(a.shape)}, expected {list(e.shape)}"
    differ = (a != e).nonzero()
    assert not len(differ), f"{what}: {len(differ)} of {a.numel()} differ, first at {differ[0].tolist()}"


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on DEVICE, the same for a seed wherever that is."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)
