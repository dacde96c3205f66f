"""The functions of cpu.c over tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from accel.kernels.common import kind
from accel.kernels.row_step.reference import PANEL, Panels

# what cpu.c's vectors and buffers take
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 16

_SIGNATURES = {
    "add_norm": (c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_void_p),
    "linear": (c_int, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
    "silu_mul": (c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "attend": (
        c_int, c_void_p, c_int64, c_int64, c_int64, c_int64, c_float, c_void_p, c_int64, c_void_p, c_int64,
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p,
    ),
}  # fmt: skip


class Compiled:
    """``reference``'s functions, compiled, for fp32 on a CPU; they take as many threads as torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
            getattr(library, name).restype = None
        library.attend.restype = c_int
        self._linear, self._attend = library.linear, library.attend
        self._add_norm, self._silu_mul = library.add_norm, library.silu_mul

    def linear(self, x: Tensor, panels: Panels) -> Tensor:
        """x weightᵀ: fp32 x ``[…, I]``, a weight ``[O, I]`` → ``[…, O]``."""
        rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, panels.inputs).contiguous()
        tokens, inputs = rows.shape
        if inputs != panels.inputs or x.dtype != torch.float32:
            raise ValueError(f"x is {kind(x)}: must be float32 […, {panels.inputs}] on cpu")
        out = rows.new_empty(tokens, panels.num_panels * PANEL)
        self._linear(
            torch.get_num_threads(), tokens, inputs, panels.num_panels, rows.data_ptr(), rows.stride(0),
            panels.address, out.data_ptr(),
        )  # fmt: skip
        if panels.outputs % PANEL:
            out = out[:, : panels.outputs].contiguous()
        return out if rows is x else out.view(*x.shape[:-1], panels.outputs)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x += delta in place, then RMSNorm(x): x, delta ``[N, H]``, weight ``[H]`` → ``[N, H]``."""
        assert x.is_contiguous() and x.dtype == torch.float32, "x is written to where it lies"
        delta = None if delta is None else _plain(delta).contiguous()
        weight, out = _plain(weight), torch.empty_like(x)
        added = None if delta is None else delta.data_ptr()
        self._add_norm(
            torch.get_num_threads(), len(x), x.shape[1], x.data_ptr(), added, weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up: ``[N, I]`` each → ``[N, I]``."""
        gate, up = _plain(gate), _plain(up)
        if gate.stride() != up.stride():
            gate, up = gate.contiguous(), up.contiguous()
        n, width = gate.shape
        out = gate.new_empty(n, width)
        self._silu_mul(
            torch.get_num_threads(), n, width, gate.stride(0), gate.data_ptr(), up.data_ptr(), out.data_ptr()
        )
        return out

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        cosine: Tensor,
        sine: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
    ) -> Tensor:
        """Rotate new queries and keys, put keys and values behind their rows' own, and attend to all a row holds.

        q ``[N, H · D]``, k and v ``[N, Hkv · D]``; rows ``[R, 5]`` from ``layout``; cosine and sine ``[positions, D]``,
        the first half of sine negative; stores ``[slots, Hkv, capacity, D]``, written to → ``[N, H · D]``. D must be
        a multiple of 16, at most 256.
        """
        q, k, v = _plain(q), _plain(k), _plain(v)
        _, kv_heads, capacity, size = keys.shape
        assert all(each.is_contiguous() for each in (rows, cosine, sine, keys, values))
        assert keys.dtype == values.dtype == torch.float32 and size % HEAD_SIZE_MULTIPLE == 0 and size <= MAX_HEAD_SIZE
        out = q.new_empty(q.shape)
        failed = self._attend(
            torch.get_num_threads(), rows.data_ptr(), len(rows), q.shape[1] // size, kv_heads, size, scale,
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(), values.data_ptr(), capacity, out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of an attention step")
        return out


def _plain(x: Tensor) -> Tensor:
    """In fp32, the last axis without gaps: what a module in a linear layer's place gives may be neither."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
