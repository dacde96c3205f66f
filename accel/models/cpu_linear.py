"""Faster fp32 linear layers on a CPU, installed on a model and removed without a trace.

Decoding multiplies one to sixteen rows by every weight matrix. torch's ``F.linear`` takes MKL's matrix-vector path
for one row and a poor matrix-matrix shape for a few; both leave memory bandwidth unused. Four ways are known here:

``compiled``    C on a weight reordered once (``accel.kernels.row_step``): the fastest where it was measured, costs a
                second copy of the weights and needs a C compiler;
``packed``      oneDNN's inner product on a weight reordered once, at the same cost in memory;
``transposed``  ``weight @ x.T`` (one row is padded to two), no extra memory;
``linear``      ``F.linear`` itself.

``auto`` measures them on a sample of the model's own shapes and takes, per number of rows, the fastest whose memory
fits. All four compute the same sums in another order: results differ by rounding only.

A draft model may be rounded, because what it says is verified: where there is a C compiler ``auto`` is then ``int8``,
the compiled product on weights in 8 bits with one scale an output: a quarter of the bytes to stream, for about half a
percent of error. It is then taken for any number of rows, unmeasured: a draft that rounds now and then would have what
is sampled with its help depend on how many rows are read together, or on how busy the machine was when it measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.artifacts.resolve import compiled_folder
from accel.errors import OptionError, unknown_name
from accel.kernels import row_step

WAYS = ("auto", "compiled", "packed", "transposed", "linear")

# row counts that are measured; a count in between takes the way of the next one up, more than the last that of the last
MEASURED_ROWS = (1, 2, 4, 6, 8, 16)
# size of the measured sample: enough to stream from memory and not from the last-level cache
SAMPLE_BYTES = 96 << 20
# reordering is skipped where the copies would take more than this share of the memory that is free
MAX_SHARE_OF_FREE_MEMORY = 0.5

Made = TypeVar("Made")
LinearFunction = Callable[[Tensor], Tensor]
# inputs, outputs, has a bias
Shape = tuple[int, int, bool]


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

    ``may_round``: the model's results need not be exact, so that ``auto`` takes ``int8`` where it can.
    """
    if way not in WAYS:
        raise OptionError(unknown_name("cpu_linear", way, WAYS))
    modules = tuple(_eligible(model)) if way != "linear" else ()
    if not modules:
        return Installed((), {}, 0)
    weights = sum(m.weight.numel() * 4 for m in modules)
    can_pack, made = _packing_works(), row_step.compiled(compiled_folder())
    if way == "packed" and not can_pack:
        raise OptionError("cpu_linear='packed' needs a torch built with oneDNN: use 'transposed' or 'auto'")
    if way == "compiled" and made is None:
        raise OptionError("cpu_linear='compiled' needs a C compiler: install one, or use 'transposed' or 'auto'")
    if way == "auto" and may_round and made is not None:
        way_by_rows = dict.fromkeys(MEASURED_ROWS, "int8")
    elif way == "auto":
        copies = int(MAX_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available / weights)
        reordered = [*(["compiled"] if made is not None else []), *(["packed"] if can_pack else [])]
        ways = ("linear", "transposed", *reordered[:copies])
        way_by_rows = dict(_fastest(_sample(modules), ways, torch.get_num_threads()))
    else:
        way_by_rows = dict.fromkeys(MEASURED_ROWS, way)
    chosen = set(way_by_rows.values())
    for module in modules:
        module.forward = _FastForward(module, way_by_rows)  # type: ignore[method-assign, assignment]
    copied = weights * len(chosen & {"packed", "compiled"}) + weights // 4 * ("int8" in chosen)
    return Installed(modules, way_by_rows, copied)


def panels_of(module: nn.Module, rows: int) -> row_step.Panels | None:
    """The reordered weight of a layer that was installed, for who multiplies ``rows`` rows by many layers in one call.

    None where calling the layer would be more, or something else.
    """
    forward = module.__dict__.get("forward")
    if type(forward) is not _FastForward or module._forward_hooks or module._forward_pre_hooks:
        return None
    return forward.panels(rows)


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
        self._many = functions[way_by_rows[most]]
        self._module, self._parameters = module, module._parameters
        self._most = most
        self._features = module.in_features
        self._by_rows = [functions[way_by_rows[next(r for r in MEASURED_ROWS if r >= n)]] for n in range(1, most + 1)]

    def __call__(self, x: Tensor) -> Tensor:
        # the module's own dict: a step asks hundreds of times, and nn.Module's look-up takes longer than all else here
        weight = self._parameters["weight"]
        assert weight is not None, "a linear layer has a weight"
        # training, autocast and a model that was moved or cast meanwhile are torch's own business
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not x.dtype == weight.dtype == torch.float32
            or not (x.is_cpu and weight.is_cpu)
        ):
            return F.linear(x, weight, self._parameters["bias"])
        return self._function(x.numel() // self._features)(x)

    def _function(self, rows: int) -> LinearFunction:
        return self._many if rows > self._most else self._by_rows[max(rows, 1) - 1]

    def panels(self, rows: int) -> row_step.Panels | None:
        """The reordered weight, where the product of so many rows is with that and nothing else."""
        function, weight = self._function(rows), self._parameters["weight"]
        if type(function) is not _Compiled or self._parameters["bias"] is not None:
            return None
        return function.panels() if weight is not None and weight.dtype == torch.float32 and weight.is_cpu else None

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
    packed = _current(module, _pack)
    return lambda x: run(x, packed(), module.bias, "none", [], "")


class _Compiled:
    """The compiled product, on fp32 weights or, ``in_8_bits``, rounded ones."""

    def __init__(self, module: nn.Linear, in_8_bits: bool = False) -> None:
        made = row_step.compiled(compiled_folder())
        assert made is not None, "install() asks first"
        self._linear, self._parameters = made.linear, module._parameters
        self.panels = _current(module, functools.partial(row_step.panels, in_8_bits=in_8_bits))

    def __call__(self, x: Tensor) -> Tensor:
        out, bias = self._linear(x, self.panels()), self._parameters["bias"]
        return out if bias is None else out.add_(bias)


def _current(module: nn.Linear, make: Callable[[Tensor], Made]) -> Callable[[], Made]:
    """What ``make`` makes of the layer's weight, made again when that changed.

    A copy must not outlive what it was made of: load_state_dict, an optimizer's step, another Parameter.
    """
    parameters = module._parameters
    made, made_of = make(module.weight), _state(module.weight)

    def current() -> Made:
        nonlocal made, made_of
        weight = parameters["weight"]
        assert weight is not None, "a linear layer has a weight"
        if made_of != _state(weight):
            made, made_of = make(weight), _state(weight)
        return made

    return current


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes whenever the weight is replaced or written to (through ``.data`` alone, torch does not say)."""
    return weight.data_ptr(), weight._version


_FUNCTIONS: dict[str, Callable[[nn.Linear], LinearFunction]] = {
    "linear": _linear,
    "transposed": _transposed,
    "compiled": _Compiled,
    "packed": _packed,
    "int8": functools.partial(_Compiled, in_8_bits=True),
}


def _packing_works() -> bool:
    """Whether this torch has oneDNN's packed linear; the operators are torch.compile's own, hence the probe."""
    try:
        with torch.no_grad():
            probe, x = _ones(16, 16, True), torch.ones(1, 16)
            return bool(torch.allclose(_packed(probe)(x), probe(x), atol=1e-5))
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
