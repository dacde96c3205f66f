"""What every reader of foreign cache files hands back, and the checks that all of them share.

Knows tensors, their shapes and which values may stand in them. Knows no file format, no model and no tokenizer:
whether the keys belong to a model, and at which positions they were rotated, cannot be seen here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from accel.artifacts.checks import non_finite
from accel.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class Foreign:
    """The cache of a prefix that every later token attends to, of one sequence.

    Per layer: keys [Hkv, P, D], rotated already, values [Hkv, P, Dv], bias [Hkv, P]. The bias is added to the scores
    after the 1/√D scaling; −inf marks a slot that no query sees.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: tuple[Tensor, ...] | None
    # leading slots that training left as they were
    sink_tokens: int
    # the position of the first token behind the prefix, which need not be P; None: the file does not say
    num_positions: int | None
    # opens every message
    source: str
    # what else the file says of itself, in plain values
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self._wrong_shapes() or self._wrong_counts() or self._wrong_values()
        if problem:
            raise ArtifactError(f"{self.source}: {problem}")

    @property
    def num_slots(self) -> int:
        """P, hidden slots included."""
        return self.keys[0].shape[1]

    def _wrong_shapes(self) -> str | None:
        if not self.keys or len(self.keys) != len(self.values):
            return f"{len(self.keys)} layers of keys, {len(self.values)} of values: as many of each, at least 1, needed"
        if self.bias is not None and len(self.bias) != len(self.keys):
            return f"{len(self.bias)} layers of bias, {len(self.keys)} of keys: as many of each needed"
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            found = f"layer {layer} has keys {shape(keys)} and values {shape(values)}"
            if keys.dim() != 3 or values.dim() != 3 or not all((*keys.shape, *values.shape)):
                return f"{found}: [heads, slots, size], each at least 1, is allowed"
            if keys.shape[:2] != values.shape[:2]:
                return f"{found}: heads and slots must agree"
            if keys.shape != self.keys[0].shape or values.shape != self.values[0].shape:
                return f"{found}, layer 0 {shape(self.keys[0])} and {shape(self.values[0])}: layers must agree"
            if self.bias is not None and self.bias[layer].shape != keys.shape[:2]:
                return f"{found} but a bias {shape(self.bias[layer])}: [heads, slots] is allowed"
        return None

    def _wrong_counts(self) -> str | None:
        if not _is_count(self.sink_tokens) or self.sink_tokens > self.num_slots:
            return f"sink_tokens is {self.sink_tokens!r}: an integer from 0 to the {self.num_slots} slots is allowed"
        if self.num_positions is None:
            return None
        # each slot was a token of its own once, so the prefix never covers fewer positions than it has slots
        if not _is_count(self.num_positions) or self.num_positions < self.num_slots:
            return f"num_positions is {self.num_positions!r}: an integer from the {self.num_slots} slots on is allowed"
        return None

    def _wrong_values(self) -> str | None:
        for name, tensors in (("keys", self.keys), ("values", self.values), ("bias", self.bias or ())):
            for layer, tensor in enumerate(tensors):
                if not tensor.is_floating_point():
                    return f"{name} of layer {layer} are {tensor.dtype}: a floating-point type is allowed"
                hides = tensor.float() == -math.inf if name == "bias" else None
                if non_finite(tensor if hides is None else tensor.float().masked_fill(hides, 0)):
                    allowed = "finite numbers" if hides is None else "finite numbers and -inf"
                    return f"{name} of layer {layer} hold NaN or infinity: {allowed} are allowed"
        return None


def shape(tensor: Tensor) -> str:
    """[2, 5, 8], as messages show it."""
    return str(list(tensor.shape))


def without_batch(tensor: Any, dims: int, source: str, name: str) -> Tensor:
    """``tensor`` [1, …] or […] with ``dims`` axes behind the batch → […]; a batch of several sequences is refused."""
    if not isinstance(tensor, Tensor):
        raise ArtifactError(f"{source}: {name} is of type {type(tensor).__name__}: a tensor is allowed")
    if not tensor.is_floating_point():
        raise ArtifactError(f"{source}: {name} is {tensor.dtype}: a floating-point type is allowed")
    if tensor.dim() == dims + 1 and tensor.shape[0] == 1:
        return tensor[0]
    if tensor.dim() != dims:
        axes = "heads, slots, size" if dims == 3 else "heads, slots"
        raise ArtifactError(f"{source}: {name} is {shape(tensor)}: [1, {axes}], of one sequence, is allowed")
    return tensor


def pad_to_longest(
    keys: Sequence[Tensor], values: Sequence[Tensor], bias: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Layers of one length: the shorter ones get hidden slots of zeros behind their own.

    keys [Hkv, P_l, D], values [Hkv, P_l, Dv], bias [Hkv, P_l] → the same with P = max P_l. Exact, because the bias of a
    hidden slot is −inf and e^−inf = 0.
    """
    gaps = [max(layer.shape[1] for layer in keys) - layer.shape[1] for layer in keys]
    if not any(gaps):
        return list(keys), list(values), None if bias is None else list(bias)
    if bias is None:
        bias = [torch.zeros(layer.shape[:2]) for layer in keys]
    # values and bias get the gap of their keys: where they disagreed before they still do, and are refused for it
    return (
        [functional.pad(layer, (0, 0, 0, gap)) for layer, gap in zip(keys, gaps, strict=True)],
        [functional.pad(layer, (0, 0, 0, gap)) for layer, gap in zip(values, gaps, strict=True)],
        [functional.pad(layer, (0, gap), value=-math.inf) for layer, gap in zip(bias, gaps, strict=True)],
    )


def remaining(content: Mapping[Any, Any], read: Collection[str], source: str) -> dict[str, Any]:
    """The entries of ``content`` that are not in ``read``, for ``details``; tensors among them are refused."""
    rest = {str(name): value for name, value in content.items() if name not in read}
    for name, value in rest.items():
        if _holds_tensor(value):
            # a bias, say, without which the same keys and values compute something else
            raise ArtifactError(f"{source}: holds tensors in {name!r}: only {', '.join(sorted(read))} are understood")
    return rest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # bool is an int and not a count


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)
