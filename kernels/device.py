"""Where a kernel runs: the one question every family's public function asks before it picks a path."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Whether ``x`` lies on a CUDA or ROCm device and Triton is installed; elsewhere the reference is the path."""
    return x.is_cuda and _has_triton()


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether someone will ask for a gradient of ``inputs``: a kernel without a backward pass then leaves the work to
    its reference."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
