"""Caches that a press of NVIDIA/kvpress has shortened: transformers' DynamicCache, which has no file format of its own.

Three forms are in use and read here: (key, value) pairs, a layer each (``cache.to_legacy_cache()``, or a cache turned
into a list, whose third item is the window of a sliding layer or None); {"key_cache": [...], "value_cache": [...]};
and safetensors with key_cache.0, value_cache.0, … Tensors are [1, Hkv, P, D].

Keys keep the rotation of the whole context, and kvpress goes on at ``context_length``, the length before the press —
unless the press rotated keys anew (KeyRerotationPress, FinchPress) and the length is P. No form of the file tells the
two apart or has a place for the length; where no entry states it, ``num_positions`` is None. What a press hides head by
head (AdaKV, KVzip, DuoAttention) is kept on the model and not in the cache: such a file holds every token still.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from accel.artifacts.foreign_files import read_safetensors
from accel.errors import ArtifactError
from accel.methods.cartridge.convert.foreign import Foreign, pad_to_longest, remaining, without_batch

KEYS, VALUES = "key_cache", "value_cache"
# names by which a file may state the length before the press; the first is the variable of kvpress/pipeline.py
LENGTHS = ("context_length", "original_length", "original_seq_len")

_TENSOR_NAME = re.compile(rf"({KEYS}|{VALUES})\.(0|[1-9]\d{{0,3}})")


def recognises(content: Any) -> bool:
    """Whether this has the two named lists, or begins with a pair, or with a triple that ends in a window or None."""
    if isinstance(content, dict):
        return KEYS in content or VALUES in content
    first = content[0] if isinstance(content, (list, tuple)) and content else None
    if not isinstance(first, (list, tuple)) or not all(isinstance(item, Tensor) for item in first[:2]):
        return False
    return len(first) == 2 or (len(first) == 3 and first[1].dim() == first[0].dim())


def convert(content: Any, source: str) -> Foreign:
    """The layers brought to one length; presses may give each layer its own."""
    pairs = _pairs(content, source)
    keys = [without_batch(key, 3, source, f"key of layer {index}") for index, (key, _) in enumerate(pairs)]
    values = [without_batch(value, 3, source, f"value of layer {index}") for index, (_, value) in enumerate(pairs)]
    num_layer_slots = [layer.shape[1] for layer in keys]
    padded_keys, padded_values, bias = pad_to_longest(keys, values, None)
    named = content if isinstance(content, dict) else {}
    rest = remaining(named, (KEYS, VALUES, *LENGTHS), source)
    return Foreign(
        keys=tuple(padded_keys),
        values=tuple(padded_values),
        bias=None if bias is None else tuple(bias),
        sink_tokens=0,
        num_positions=_stated_length(named, source),
        source=source,
        details=rest | {"format": "kvpress", "num_layer_slots": num_layer_slots},
    )


def load_safetensors(path: str | Path, max_bytes: int) -> dict[str, Any]:
    """{"key_cache": [...], "value_cache": [...]} from tensors named key_cache.0, …, with the file's metadata beside."""
    tensors, metadata = read_safetensors(path, max_bytes)
    content: dict[str, Any] = dict(metadata)
    found = [match for match in map(_TENSOR_NAME.fullmatch, tensors) if match]
    if not found or len(found) != len(tensors):
        odd = min(set(tensors) - {match[0] for match in found}, default="no tensor")
        raise ArtifactError(f"{path}: holds {odd!r}: tensors named {KEYS}.0, {VALUES}.0, {KEYS}.1, … are allowed")
    for kind in (KEYS, VALUES):
        indices = sorted(int(match[2]) for match in found if match[1] == kind)
        if indices != list(range(len(indices))):
            raise ArtifactError(f"{path}: {kind} is numbered {str(indices)[:80]}: 0, 1, 2, … without a gap is allowed")
        content[kind] = [tensors[f"{kind}.{index}"] for index in indices]
    return content


def _pairs(content: Any, source: str) -> list[tuple[Any, Any]]:
    """(key, value) of each layer, whatever the form."""
    if isinstance(content, dict):
        keys, values = content.get(KEYS), content.get(VALUES)
        if not isinstance(keys, (list, tuple)) or not isinstance(values, (list, tuple)) or len(keys) != len(values):
            raise ArtifactError(f"{source}: {KEYS} and {VALUES} are not two lists of as many tensors")
        layers: Any = list(zip(keys, values, strict=True))
    else:
        layers = content
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ArtifactError(f"{source}: holds no layers: (key, value) pairs or lists {KEYS} and {VALUES} are allowed")
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) not in (2, 3):
            raise ArtifactError(f"{source}: layer {index} is no pair: (key, value) is allowed")
        if len(layer) == 3 and layer[2] is not None:
            raise ArtifactError(f"{source}: layer {index} has a sliding window: layers that see all slots are allowed")
    return [(layer[0], layer[1]) for layer in layers]


def _stated_length(named: dict[Any, Any], source: str) -> int | None:
    """The original length, where an entry states it; metadata of safetensors are strings."""
    stated = {name: named[name] for name in LENGTHS if named.get(name) is not None}
    texts = {str(value) for value in stated.values()}
    if len(texts) > 1 or not all(re.fullmatch(r"[1-9][0-9]{0,11}", text) for text in texts):
        raise ArtifactError(f"{source}: states {str(stated)[:100]}: one integer of at least 1 is allowed")
    return int(texts.pop()) if texts else None
