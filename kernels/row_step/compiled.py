"""The functions of cpu.c over tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.kernels.common import kind
from accel.kernels.row_step.reference import PACKED, PANEL, Layer, Panels

# what cpu.c's vectors and buffers take
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 16

_SIGNATURES = {
    "add_norm": (c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_void_p),
    "linear": (c_int, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    "silu_mul": (c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "attend": (
        c_int, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_float, c_void_p, c_int64, c_void_p, c_int64,
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p,
    ),
    "layers": (
        c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int64,
        c_float, c_float, c_void_p, c_void_p, c_int64, c_void_p,
    ),
}  # fmt: skip
# fields of cpu.c's Weight
_WEIGHT = ("panels", "scales", "inputs", "num_panels")


class Stack:
    """Decoder layers as ``Compiled.layers`` takes them, all of one shape."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        records = []
        for layer in layers:
            norms = [layer.before_attention, layer.before_mlp]
            assert all(norm.dtype == torch.float32 and norm.is_contiguous() for norm in norms)
            fields = [norm.data_ptr() for norm in norms]
            for parts, most in ((layer.qkv, 3), (layer.out, 1), (layer.gate_up, 2), (layer.down, 1)):
                assert len(parts) <= most and not any(part.outputs % PANEL for part in parts)
                fields += [field for part in parts for field in part.record.tolist()]
                fields += [0] * (len(_WEIGHT) * (most - len(parts)))
            records.append([*fields, 0, 0])
        self.table = torch.tensor(records)
        self.inner = layers[0].down[0].inputs
        # what the table points to
        self.layers = tuple(layers)
        self._addresses: list[tuple[int, int]] = []

    def point_to(self, stores: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Say where the layers' keys and values lie, which is the same in most steps."""
        addresses = [(keys.data_ptr(), values.data_ptr()) for keys, values in stores]
        if addresses != self._addresses:
            self.table[:, -2:], self._addresses = torch.tensor(addresses), addresses


class Compiled:
    """``reference``'s functions, compiled, for fp32 on a CPU; they take as many threads as torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
            getattr(library, name).restype = None
        library.attend.restype = library.layers.restype = c_int
        self._linear, self._attend, self._layers = library.linear, library.attend, library.layers
        self._add_norm, self._silu_mul = library.add_norm, library.silu_mul

    def linear(self, x: Tensor, panels: Panels) -> Tensor:
        """x weightᵀ: fp32 x ``[…, I]``, a weight ``[O, I]`` in fp32 or 8 bits → ``[…, O]``."""
        rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, panels.inputs).contiguous()
        tokens, inputs = rows.shape
        if inputs != panels.inputs or x.dtype != torch.float32:
            raise ValueError(f"x is {kind(x)}: must be float32 […, {panels.inputs}] on cpu")
        if panels.scales is not None and inputs % PACKED:
            rows = F.pad(rows, (0, -inputs % PACKED))
        out = rows.new_empty(tokens, panels.outputs + -panels.outputs % PANEL)
        self._linear(
            torch.get_num_threads(), tokens, panels.address, rows.data_ptr(), rows.stride(0), out.data_ptr(),
            out.stride(0),
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
        depths: Tensor | None = None,
    ) -> Tensor:
        """Rotate new queries and keys, put keys and values behind their rows' own, and attend to all a row holds.

        q ``[N, H · D]``, k and v ``[N, Hkv · D]``; rows ``[R, 5]`` from ``layout``; cosine and sine ``[positions, D]``,
        the first half of sine negative; stores ``[slots, Hkv, capacity, D]``, written to → ``[N, H · D]``. D must be
        a multiple of 16, at most 256.

        ``depths`` int64 ``[N]``, at most each token's place in its row: the token's position behind that of the row's
        first new one, and how many of the new tokens it sees before itself. None: each sees all before it.
        """
        q, k, v = _plain(q), _plain(k), _plain(v)
        _, kv_heads, capacity, size = keys.shape
        assert all(each.is_contiguous() for each in (rows, cosine, sine, keys, values))
        assert keys.dtype == values.dtype == torch.float32 and size % HEAD_SIZE_MULTIPLE == 0 and size <= MAX_HEAD_SIZE
        out = q.new_empty(q.shape)
        failed = self._attend(
            torch.get_num_threads(), rows.data_ptr(), len(rows), _address(depths), q.shape[1] // size, kv_heads, size,
            scale,
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(), values.data_ptr(), capacity, out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of an attention step")
        return out

    def layers(
        self,
        x: Tensor,
        stack: Stack,
        rows: Tensor,
        cosine: Tensor,
        sine: Tensor,
        stores: Sequence[tuple[Tensor, Tensor]],
        *,
        heads: int,
        eps: float,
        scale: float,
        depths: Tensor | None = None,
    ) -> Tensor:
        """All layers in one call: x ``[N, H]``, written to → what the last norm is taken of ``[N, H]``.

        rows, cosine, sine, depths and a layer's stores are ``attend``'s, the stores of all layers of one shape. Every
        weight's outputs must be a multiple of 16.
        """
        keys = stores[0][0]
        _, kv_heads, capacity, size = keys.shape
        assert x.is_contiguous() and x.dtype == keys.dtype == torch.float32
        assert all(each.is_contiguous() for each in (rows, cosine, sine))
        stack.point_to(stores)
        failed = self._layers(
            torch.get_num_threads(), stack.table.data_ptr(), len(stack.layers), rows.data_ptr(), len(rows),
            _address(depths), len(x), x.shape[1], heads, kv_heads, size, stack.inner, eps, scale, cosine.data_ptr(),
            sine.data_ptr(), capacity, x.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for what lies between the products of a step")
        return x


def _address(x: Tensor | None) -> int | None:
    assert x is None or (x.dtype == torch.int64 and x.is_contiguous())
    return None if x is None else x.data_ptr()


def _plain(x: Tensor) -> Tensor:
    """In fp32, the last axis without gaps: what a module in a linear layer's place gives may be neither."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
