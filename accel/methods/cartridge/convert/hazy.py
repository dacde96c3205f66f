"""Cartridges of HazyResearch/cartridges (Eyuboglu et al. 2025, arXiv 2506.06266), as ``TrainableCache.save`` writes.

The file is a dict of lists with a tensor [1, Hkv, tokens, D] a layer. Two layouts exist: v1 calls the tokens that
training left alone ``fixed_*``, v2 ``frozen_*``. Keys are rotated for positions 0 to P − 1 and queries go on at P. The
file names no model, no RoPE base and no chat template; whoever converts it has to know them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.methods.cartridge.convert.foreign import Foreign, remaining, shape, without_batch

TRAINABLE = ("trainable_keys", "trainable_values")
# layout → its names of the frozen part
FROZEN = {"v1": ("fixed_keys", "fixed_values"), "v2": ("frozen_keys", "frozen_values")}


def recognises(content: Any) -> bool:
    """Whether this looks like such a file, whole or not."""
    return isinstance(content, dict) and any(name in content for name in TRAINABLE)


def convert(content: Any, source: str) -> Foreign:
    """The frozen tokens followed by the trained ones, layer by layer."""
    if not isinstance(content, dict):
        raise ArtifactError(f"{source}: holds a {type(content).__name__}: a dict with {TRAINABLE[0]}, … is allowed")
    layouts = [layout for layout, names in FROZEN.items() if any(content.get(name) is not None for name in names)]
    if len(layouts) > 1:
        raise ArtifactError(f"{source}: holds fixed_* and frozen_* tokens: one of the two is allowed")
    # a file without any frozen entry is the same in both layouts
    frozen_names = FROZEN[layouts[0] if layouts else "v2"]
    trained = [_layers(content, name, source) for name in TRAINABLE]
    frozen = [_layers(content, name, source) if content.get(name) is not None else [] for name in frozen_names]
    if not trained[0] or len(trained[0]) != len(trained[1]):
        counts = f"{len(trained[0])} layers of keys, {len(trained[1])} of values"
        raise ArtifactError(f"{source}: {counts}: as many of each, at least 1, needed")
    num_frozen = _frozen_tokens(frozen, len(trained[0]), source)
    keys, values = (_joined(*parts, source) for parts in zip(frozen, trained, strict=True))
    num_slots = keys[0].shape[1]
    known = {name for names in (TRAINABLE, *FROZEN.values()) for name in names}
    details = {"format": "hazy", "layout": layouts[0] if layouts else "v1 or v2", "num_trained": num_slots - num_frozen}
    return Foreign(
        keys=tuple(keys),
        values=tuple(values),
        bias=None,
        sink_tokens=num_frozen,
        num_positions=num_slots,
        source=source,
        details=remaining(content, known, source) | details,
    )


def _layers(content: dict[Any, Any], name: str, source: str) -> list[Tensor]:
    """The layers of one entry, each [Hkv, tokens, D]."""
    layers = content.get(name)
    if not isinstance(layers, (list, tuple)):
        found = ", ".join(sorted(map(repr, content)))
        raise ArtifactError(f"{source}: has no list {name!r}: it holds {found[:200]}")
    return [without_batch(layer, 3, source, f"{name}[{index}]") for index, layer in enumerate(layers)]


def _frozen_tokens(frozen: list[list[Tensor]], num_layers: int, source: str) -> int:
    """How many tokens lead every layer, keys and values alike; none at all is a file with empty lists, or without."""
    for layers in frozen:
        if layers and len(layers) != num_layers:
            raise ArtifactError(f"{source}: {len(layers)} frozen layers, {num_layers} trained: as many of each needed")
    # the token axis; the authors' own loader of v2 counts heads here
    counts = {layer.shape[1] for layers in frozen for layer in layers}
    if not all(frozen):
        counts.add(0)
    if len(counts) > 1:
        found = " and ".join(map(str, sorted(counts)))
        raise ArtifactError(f"{source}: {found} frozen tokens, by layer or by keys and values: one count is allowed")
    return counts.pop()


def _joined(frozen: list[Tensor], trained: list[Tensor], source: str) -> list[Tensor]:
    """frozen [Hkv, f, D] or no layers, trained [Hkv, t, D] → [Hkv, f + t, D] a layer, in the wider of the two types."""
    if not frozen or not frozen[0].shape[1]:
        return trained
    joined = []
    for first, rest in zip(frozen, trained, strict=True):
        if first.shape[::2] != rest.shape[::2]:
            raise ArtifactError(f"{source}: frozen {shape(first)}, trained {shape(rest)}: heads and sizes must agree")
        joined.append(torch.cat([first, rest], dim=1))
    return joined
