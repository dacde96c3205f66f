"""Faster fp32 linear layers on a CPU, installed on a model and removed without a trace.

Decoding multiplies one to sixteen rows by every weight matrix. torch's ``F.linear`` takes MKL's matrix-vector path
for one row and a poor matrix-matrix shape for a few; both leave memory bandwidth unused. Three ways are known here:

``packed``      oneDNN's inner product on a weight reordered once: the fastest where it was measured, costs a second
                copy of the weights;
``transposed``  ``weight @ x.T`` (one row is padded to two), no extra memory;
``linear``      ``F.linear`` itself.

``auto`` measures them on a sample of the model's own shapes and takes, per number of rows, the fastest whose memory
fits. All three compute the same sums in another order: results differ by rounding only.

A draft model may be rounded, because what it says is verified: ``auto`` then also knows ``int8``, weights in 8 bits
with one scale an output, products in bf16. That is a quarter of the bytes to stream, and about 1 % of error.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.errors import OptionError, unknown_name

WAYS = ("auto", "packed", "transposed", "linear")

# row counts that are measured; a count in between takes the way of the next one up
MEASURED_ROWS = (1, 2, 4, 8, 16)
# size of the measured sample: enough to stream from memory and not from the last-level cache
SAMPLE_BYTES = 96 << 20
# packing is skipped where the copy would take more than this share of the memory that is free
MAX_SHARE_OF_FREE_MEMORY = 0.5

# torch's int8 kernel reads whole vectors of aligned memory and does not check
INT8_MULTIPLE = 32

LinearFunction = Callable[[Tensor], Tensor]
# inputs, outputs, has a bias
Shape = tuple[int, int, bool]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Installed:
    """What was changed, so that it can be undone. ``way_by_rows``: the choice per measured number of rows."""

    modules: tuple[nn.Linear, ...]
    way_by_rows: dict[int, str]
    extra_bytes: int

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)


def install(model: nn.Module, way: str = "auto", *, may_round: bool = False) -> Installed:
    """Route the model's fp32 CPU linear layers through the chosen way; other layers are left alone.

    ``may_round``: the model's results need not be exact, so that ``auto`` may take ``int8``.
    """
    if way not in WAYS:
        raise OptionError(unknown_name("cpu_linear", way, WAYS))
    modules = tuple(_eligible(model)) if way != "linear" else ()
    if not modules:
        return Installed((), {}, 0)
    weights = sum(m.weight.numel() * 4 for m in modules)
    can_pack = _packing_works()
    if way == "packed" and not can_pack:
        raise OptionError("cpu_linear='packed' needs a torch built with oneDNN: use 'transposed' or 'auto'")
    if way == "auto":
        fits = weights <= MAX_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available
        ways = ("linear", "transposed", *(["packed"] if can_pack and fits else []))
        ways += ("int8",) if may_round and _int8_works() else ()
        way_by_rows = dict(_fastest(_sample(modules), ways, torch.get_num_threads()))
    else:
        way_by_rows = dict.fromkeys(MEASURED_ROWS, way)
    chosen = set(way_by_rows.values())
    for module in modules:
        module.forward = _FastForward(module, way_by_rows)  # type: ignore[method-assign, assignment]
    return Installed(modules, way_by_rows, weights * ("packed" in chosen) + weights // 4 * ("int8" in chosen))


def _eligible(model: nn.Module) -> Iterable[nn.Linear]:
    for module in model.modules():
        # exact type: subclasses (quantised, LoRA, …) compute something else; a patched forward is somebody's hook
        if (
            type(module) is nn.Linear
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
            and not module.weight.is_inference()  # torch does not tell when these are written to
            and "forward" not in module.__dict__
        ):
            yield module


class _FastForward:
    """A layer's new forward: picks by the number of rows in the input."""

    def __init__(self, module: nn.Linear, way_by_rows: dict[int, str]) -> None:
        functions = {way: _FUNCTIONS[way](module) for way in {*way_by_rows.values(), "linear"}}
        most = MEASURED_ROWS[-1]
        # int8 saves bytes and not products: many rows are no place for it
        self._many = functions["linear" if way_by_rows[most] == "int8" else way_by_rows[most]]
        self._module = module
        self._most = most
        self._features = module.in_features
        self._by_rows = [functions[way_by_rows[next(r for r in MEASURED_ROWS if r >= n)]] for n in range(1, most + 1)]

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        weight = module.weight
        # training, autocast and a model that was moved or cast meanwhile are torch's own business
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not x.dtype == weight.dtype == torch.float32
            or not x.device == weight.device == _CPU
        ):
            return F.linear(x, weight, module.bias)
        rows = x.numel() // self._features
        return self._many(x) if rows > self._most else self._by_rows[max(rows, 1) - 1](x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied layer computes with its own weights, so it gets torch's forward and not this one."""
        return MethodType(nn.Linear.forward, memo[id(self._module)])


def _linear(module: nn.Linear) -> LinearFunction:
    return lambda x: F.linear(x, module.weight, module.bias)


def _transposed(module: nn.Linear) -> LinearFunction:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        # two columns take MKL's matrix-matrix path, which streams the weight faster than its matrix-vector one
        columns = flat.t().expand(-1, 2) if rows == 1 else flat.t()
        # contiguous: what follows would be slower on columns, and that should count when ways are measured
        out = (module.weight @ columns).t()[:rows].contiguous()
        if module.bias is not None:
            out = out + module.bias
        return out.reshape(*x.shape[:-1], module.out_features)

    return forward


def _packed(module: nn.Linear) -> LinearFunction:
    run = torch.ops.mkldnn._linear_pointwise.default
    packed, made_of = _pack(module.weight)

    def forward(x: Tensor) -> Tensor:
        nonlocal packed, made_of
        # the copy must not outlive what it was made of: load_state_dict, an optimizer's step, another Parameter
        if made_of != _state(module.weight):
            packed, made_of = _pack(module.weight)
        return run(x, packed, module.bias, "none", [], "")

    return forward


def _int8(module: nn.Linear) -> LinearFunction:
    if module.in_features % INT8_MULTIPLE:
        return _linear(module)
    run = torch._weight_int8pack_mm
    rounded, scales = _round(module.weight)
    made_of = _state(module.weight)

    def forward(x: Tensor) -> Tensor:
        nonlocal rounded, scales, made_of
        if made_of != _state(module.weight):
            rounded, scales = _round(module.weight)
            made_of = _state(module.weight)
        # a fresh tensor begins at an aligned address, which a view of another need not
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16, copy=True)
        out = run(flat, rounded, scales).float()
        if module.bias is not None:
            out = out + module.bias
        return out.reshape(*x.shape[:-1], module.out_features)

    return forward


def _round(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] → int8 [O, I] and its scales bf16 [O]."""
    weight = weight.detach()
    scales = (weight.abs().amax(-1).clamp(min=torch.finfo(torch.bfloat16).tiny) / 127).bfloat16()
    rounded = (weight / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return rounded.contiguous(), scales


def _pack(weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), _state(weight)


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes whenever the weight is replaced or written to (through ``.data`` alone, torch does not say)."""
    return weight.data_ptr(), weight._version


_FUNCTIONS: dict[str, Callable[[nn.Linear], LinearFunction]] = {
    "linear": _linear,
    "transposed": _transposed,
    "packed": _packed,
    "int8": _int8,
}


def _packing_works() -> bool:
    """Whether this torch has oneDNN's packed linear; the operators are torch.compile's own, hence the probe."""
    try:
        with torch.no_grad():
            probe, x = _ones(16, 16, True), torch.ones(1, 16)
            return bool(torch.allclose(_packed(probe)(x), probe(x), atol=1e-5))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _int8_works() -> bool:
    """Whether this torch multiplies by 8-bit weights, which it does for its own compiler."""
    try:
        with torch.no_grad():
            probe, x = _ones(INT8_MULTIPLE, 16, True), torch.ones(2, INT8_MULTIPLE)
            return bool(torch.allclose(_int8(probe)(x), probe(x), rtol=0.02))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _sample(modules: Iterable[nn.Linear]) -> tuple[Shape, ...]:
    """The shapes of the first layers, enough of them to leave the cache: what the choice depends on."""
    sample: list[Shape] = []
    for module in modules:
        if sum(4 * inputs * outputs for inputs, outputs, _ in sample) < SAMPLE_BYTES:
            sample.append((module.in_features, module.out_features, module.bias is not None))
    return tuple(sample)


@functools.lru_cache(maxsize=32)
def _fastest(sample: tuple[Shape, ...], ways: tuple[str, ...], num_threads: int) -> tuple[tuple[int, str], ...]:
    """(rows, the fastest way) for each measured number of rows; measured once a process, so attaching stays quick.

    ``num_threads`` is there to be a part of the key.
    """
    with torch.no_grad():
        layers = [_ones(*shape) for shape in sample]
        functions = {way: [_FUNCTIONS[way](layer) for layer in layers] for way in ways}
        best = []
        for rows in MEASURED_ROWS:
            inputs = [torch.ones(rows, layer.in_features) for layer in layers]
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(4):
                for way in ways:  # in turn, so that a slow moment of the machine hits all of them
                    seconds[way].append(_time(functions[way], inputs))
            # the least time is what a way can do; a median of so few would follow the machine's other work
            best.append((rows, min(ways, key=lambda way: min(seconds[way]))))
    return tuple(best)


def _ones(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A layer of that shape without touching anybody's random numbers."""
    layer = nn.Linear(inputs, outputs, bias, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.fill_(1.0)
    return layer


def _time(functions: Iterable[LinearFunction], inputs: Iterable[Tensor]) -> float:
    start = time.perf_counter()
    for function, x in zip(functions, inputs, strict=True):
        function(x)
    return time.perf_counter() - start
