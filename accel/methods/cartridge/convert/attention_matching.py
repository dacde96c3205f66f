"""Caches compacted by Attention Matching (Zweiger et al. 2026, arXiv 2602.16284; code: adamzweiger/compaction).

The authors' code hands caches on in memory, as one (C1, beta, C2) a layer, and ``original_seq_len`` beside it. Files of
it hold just that: the layers alone, or a dict {"cache": layers, "original_seq_len": n, …}. C1 and C2 are the keys and
values [1, Hkv, t, D] and beta [1, Hkv, t] is added to the scores after scaling, per kv head. Keys keep the rotation of
the text they came from, so that queries go on at ``original_seq_len`` (their ``rope_base`` is that less the longest t).

A file does not say which layers attend through a sliding window. Such layers hold ordinary keys and values and a beta
of zeros, and cannot be told from the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.methods.cartridge.convert.foreign import Foreign, pad_to_longest, remaining, without_batch

LAYERS = ("cache", "compacted_cache")
LENGTH = "original_seq_len"


def recognises(content: Any) -> bool:
    """Whether the first layer is a triple whose middle has one axis fewer than the first."""
    layers = _layers(content)
    first = layers[0] if isinstance(layers, (list, tuple)) and layers else None
    if not isinstance(first, (list, tuple)) or len(first) != 3:
        return False
    return all(isinstance(item, Tensor) for item in first[:2]) and first[1].dim() == first[0].dim() - 1


def convert(content: Any, source: str) -> Foreign:
    """The layers brought to one length, without the slots that are padding everywhere."""
    layers = _layers(content)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ArtifactError(f"{source}: holds no list of (C1, beta, C2), alone or as {' or '.join(map(repr, LAYERS))}")
    keys, values, bias = [], [], []
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) != 3:
            raise ArtifactError(f"{source}: layer {index} is no triple: (C1, beta, C2) is allowed")
        keys.append(without_batch(layer[0], 3, source, f"C1 of layer {index}"))
        bias.append(without_batch(layer[1], 2, source, f"beta of layer {index}"))
        values.append(without_batch(layer[2], 3, source, f"C2 of layer {index}"))
    # budgets differ between layers, and the authors keep each layer at the length of its longest head
    num_layer_slots = [layer.shape[1] for layer in keys]
    padded_keys, padded_values, padded_bias = pad_to_longest(keys, values, bias)
    named = content if isinstance(content, dict) else {}
    rest = remaining(named, (_name(named), LENGTH), source)
    # checked before slots are dropped: a mask of broken tensors says nothing
    whole = Foreign(
        keys=tuple(padded_keys),
        values=tuple(padded_values),
        bias=tuple(padded_bias or ()),
        sink_tokens=0,
        num_positions=named.get(LENGTH),
        source=source,
        details=rest | {"format": "attention-matching", "num_layer_slots": num_layer_slots},
    )
    return _without_padding(whole)


def _name(named: dict[Any, Any]) -> str:
    return next((name for name in LAYERS if name in named), LAYERS[0])


def _layers(content: Any) -> Any:
    return content.get(_name(content)) if isinstance(content, dict) else content


def _without_padding(whole: Foreign) -> Foreign:
    """Drop the slots hidden in every layer and head. Those hidden in some only stay: the slot axis is shared.

    Exact: a hidden slot has weight 0, positions are in the keys, and ``num_positions`` does not count slots.
    """
    assert whole.bias is not None
    seen = torch.stack([(layer != -math.inf).any(dim=0) for layer in whole.bias]).any(dim=0)  # [P]
    if seen.all():
        return whole
    if not seen.any():
        raise ArtifactError(f"{whole.source}: every slot has a beta of -inf: there is nothing to attend to")
    return Foreign(
        keys=tuple(layer[:, seen] for layer in whole.keys),
        values=tuple(layer[:, seen] for layer in whole.values),
        bias=tuple(layer[:, seen] for layer in whole.bias),
        sink_tokens=whole.sink_tokens,
        num_positions=whole.num_positions,
        source=whole.source,
        details=whole.details | {"num_dropped_slots": int((~seen).sum())},
    )
