"""Faster fp32 linear layers on a CPU, installed on a model and removed without a trace.

Decoding multiplies one to sixteen rows by every weight matrix. torch's ``F.linear`` takes MKL's matrix-vector path
for one row and a poor matrix-matrix shape for a few; both leave memory bandwidth unused. Three ways are known here:

``packed``      oneDNN's inner product on a weight reordered once: the fastest where it was measured, costs a second
                copy of the weights;
``transposed``  ``weight @ x.T`` (one row is padded to two), no extra memory;
``linear``      ``F.linear`` itself.

``auto`` measures them on a sample of the model's own weights and takes, per number of rows, the fastest whose memory
fits. All three compute the same sums in another order: results differ by rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.errors import OptionError, unknown_name

WAYS = ("auto", "packed", "transposed", "linear")

# row counts that are measured; a count in between takes the way of the next one up
MEASURED_ROWS = (1, 2, 4, 8, 16)
# weights measured: enough to stream from memory and not from the last-level cache
SAMPLE_BYTES = 96 << 20
# packing is skipped where the copy would take more than this share of the memory that is free
MAX_SHARE_OF_FREE_MEMORY = 0.5

LinearFunction = Callable[[Tensor], Tensor]


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


def install(model: nn.Module, way: str = "auto") -> Installed:
    """Route the model's fp32 CPU linear layers through the chosen way; other layers are left alone."""
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
        way_by_rows = _measure(modules, ["linear", "transposed", *(["packed"] if can_pack and fits else [])])
    else:
        way_by_rows = dict.fromkeys(MEASURED_ROWS, way)
    packs = "packed" in way_by_rows.values()
    for module in modules:
        module.forward = _dispatch(module, way_by_rows)  # type: ignore[method-assign]
    return Installed(modules, way_by_rows, weights if packs else 0)


def _eligible(model: nn.Module) -> Iterable[nn.Linear]:
    for module in model.modules():
        # exact type: subclasses (quantised, LoRA, …) compute something else; a patched forward is somebody's hook
        if (
            type(module) is nn.Linear
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
            and "forward" not in module.__dict__
        ):
            yield module


def _dispatch(module: nn.Linear, way_by_rows: dict[int, str]) -> LinearFunction:
    """The layer's new forward: picks by the number of rows in the input."""
    functions = {way: _FUNCTIONS[way](module) for way in set(way_by_rows.values())}
    if len(functions) == 1:
        return next(iter(functions.values()))
    most = MEASURED_ROWS[-1]
    table = [functions[way_by_rows[next(r for r in MEASURED_ROWS if r >= n)]] for n in range(1, most + 1)]
    features = module.in_features

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // features
        return table[min(max(rows, 1), most) - 1](x)

    return forward


def _linear(module: nn.Linear) -> LinearFunction:
    return lambda x: F.linear(x, module.weight, module.bias)


def _transposed(module: nn.Linear) -> LinearFunction:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        # two columns take MKL's matrix-matrix path, which streams the weight faster than its matrix-vector one
        columns = flat.t() if rows > 1 else flat.t().expand(-1, 2)
        out = (module.weight @ columns).t()[:rows]
        if module.bias is not None:
            out = out + module.bias
        return out.reshape(*x.shape[:-1], -1)

    return forward


def _packed(module: nn.Linear) -> LinearFunction:
    run = torch.ops.mkldnn._linear_pointwise.default
    source: tuple[Tensor, int] | None = None
    packed = torch.empty(0)

    def forward(x: Tensor) -> Tensor:
        nonlocal source, packed
        weight = module.weight
        # the copy must not outlive the weight it was made of: load_state_dict, an optimizer's step, a new Parameter
        if source is None or source[0] is not weight or source[1] != weight._version:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            source = (weight, weight._version)
        return run(x, packed, module.bias, "none", [], "")

    return forward


_FUNCTIONS: dict[str, Callable[[nn.Linear], LinearFunction]] = {
    "linear": _linear,
    "transposed": _transposed,
    "packed": _packed,
}


def _packing_works() -> bool:
    """Whether this torch has oneDNN's packed linear; the operators are torch.compile's own, hence the probe."""
    try:
        probe = nn.Linear(16, 16)
        x = torch.ones(1, 16)
        with torch.no_grad():
            return bool(torch.allclose(_packed(probe)(x), probe(x), atol=1e-5))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


@torch.no_grad()
def _measure(modules: tuple[nn.Linear, ...], ways: list[str]) -> dict[int, str]:
    """The fastest way per number of rows, over a sample of the weights read one after the other."""
    sample, size = [], 0
    for module in modules:
        if size < SAMPLE_BYTES:
            sample.append(module)
            size += module.weight.numel() * 4
    functions = {way: [_FUNCTIONS[way](m) for m in sample] for way in ways}
    best: dict[int, str] = {}
    for rows in MEASURED_ROWS:
        inputs = [torch.ones(rows, m.in_features) for m in sample]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(4):
            for way in ways:  # in turn, so that a slow moment of the machine hits all of them
                start = time.perf_counter()
                for function, x in zip(functions[way], inputs, strict=True):
                    function(x)
                seconds[way].append(time.perf_counter() - start)
        best[rows] = min(ways, key=lambda way: median(seconds[way][1:]))
    return best
