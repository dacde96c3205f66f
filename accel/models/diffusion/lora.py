"""Merging a LoRA adapter (PEFT's folder) into a model: W + α/r · B A, for every tensor of the adapter or not at all.

Knows PEFT's file format and the names of LLaDA's modules; needs no PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.errors import ArtifactError, IncompatibleError
from accel.models.diffusion.llada import PREFIX, module_name

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# fields that change what the adapter computes, where they are anything but these values
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    # the others change the base model's weights before training
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def read_adapter_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json``; ArtifactError for what is not a plain LoRA."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: expected an object")
    for field, allowed in _PLAIN.items():
        value = raw.get(field, allowed[0])
        if value not in allowed:
            raise ArtifactError(
                f"{path}: {field} is {value!r}: only plain LoRA is merged ({field} {allowed[0]!r}); merge it with PEFT "
                "and give the merged model"
            )
    return raw


def merge_lora(model: PreTrainedModel, config: Path, weights: Path) -> list[str]:
    """Add an adapter to the model's weights, in place; returns the names of the modules that changed.

    LLaDA's own module names are understood where the model is a LLaDA read as a Llama. Names that no linear layer of
    the model has are refused before anything is changed; so are shapes that do not fit. Products are fp32.
    """
    raw = read_adapter_config(config)
    pairs = _pairs(weights)
    merged: dict[str, tuple[nn.Linear, Tensor, Tensor, float]] = {}
    for theirs, (a, b) in pairs.items():
        name, layer = _layer(model, theirs, weights)
        if name in merged:
            raise ArtifactError(f"{weights}: {theirs} and another name are both the model's {name}")
        if a.ndim != 2 or b.shape != (layer.out_features, a.shape[0]) or a.shape[1] != layer.in_features:
            raise IncompatibleError(
                f"{weights}: {theirs} has A {list(a.shape)} and B {list(b.shape)}, the model's {name} is "
                f"{list(layer.weight.shape)}: the adapter is for another model"
            )
        merged[name] = (layer, a, b, _scale(raw, theirs, a.shape[0], config))
    for layer, a, b, scale in merged.values():
        with torch.no_grad():
            where = layer.weight.device
            layer.weight.copy_(layer.weight.float() + scale * (b.to(where).float() @ a.to(where).float()))
    return list(merged)


def _pairs(weights: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's own module names with A [r, in] and B [out, r] of each."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights}: cannot be read as safetensors: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ArtifactError(f"{weights}: {name!r} is no lora_A or lora_B of a linear layer: nothing is left out")
        halves.setdefault(match[1], {})[match[2]] = tensor
    for name, half in halves.items():
        if len(half) != 2:
            raise ArtifactError(f"{weights}: {name} has lora_{next(iter(half))} alone")
    if not halves:
        raise ArtifactError(f"{weights}: holds no tensors")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _layer(model: PreTrainedModel, theirs: str, weights: Path) -> tuple[str, nn.Linear]:
    name = module_name(theirs) if theirs.startswith(PREFIX) else theirs
    module = None if name is None else dict(model.named_modules()).get(name)
    if name is None or type(module) is not nn.Linear:
        raise IncompatibleError(
            f"{weights}: {theirs} is no linear layer of {type(model).__name__}: the adapter is for another model"
        )
    if module.weight is model.get_input_embeddings().weight:
        raise IncompatibleError(f"{weights}: {theirs} is tied to the embedding, which the adapter would change too")
    return name, module


def _scale(raw: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    alpha = raw.get("lora_alpha")
    for pattern, value in (raw.get("alpha_pattern") or {}).items():
        try:
            named = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
        except re.error as error:
            raise ArtifactError(f"{path}: alpha_pattern {pattern!r} is no regular expression: {error}") from error
        if named:
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise ArtifactError(f"{path}: lora_alpha is {alpha!r}, expected a number")
    return float(alpha) / (math.sqrt(rank) if raw.get("use_rslora") else rank)
