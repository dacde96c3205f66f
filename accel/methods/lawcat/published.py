"""Checkpoints of LAWCAT's and LoLCATs' own code, by their parameters' names, as a conversion for a base model.

Their files hold the trained parameters of each stage and no base weights. What no shape tells (activation, window,
LoRA's alpha, …) is given by the caller and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from accel.artifacts.foreign_files import load_plain, read_safetensors
from accel.errors import ArtifactError, OptionError
from accel.methods.lawcat.artifact import Lawcat
from accel.models.linear import Heads, LinearSpec, LowRank

# stage 1 names parameters as the model does, stage 2 as PEFT does; hub files may say `model.` once more
_NAME = re.compile(r"(?:base_model\.model\.)?(?:model\.){0,2}layers\.(\d+)\.self_attn\.(.+)")
_LORA = re.compile(r"([qkvo]_proj)\.lora_([AB])(?:\.default)?\.weight")
# theirs → ours
_OURS = {
    "q_conv1d.weight": "q_taps",
    "k_conv1d.weight": "k_taps",
    "feature_map_q.mlp.layer": "q_map",
    "feature_map_k.mlp.layer": "k_map",
    "gk_proj.0.weight": "gate_down",
    "gk_proj.1.weight": "gate_up",
    "gk_proj.1.bias": "gate_bias",
    "gk_proj.weight": "gate_up",
    "gk_proj.bias": "gate_bias",
    "window_factors": "window_factors",
}
# a norm that is never applied, and a second name of window_factors
_UNUSED = ("g_norm.weight", "window_factor")
FAMILIES = ("lawcat", "lolcats")
# which choices are the caller's; everything else shows in the tensors
CHOICES = ("activation", "gate_normalizer", "min_log_decay", "normalised", "window", "affine", "eps")


def read(path: str | Path) -> dict[str, Tensor]:
    """One stage's parameters: a safetensors file, or one of ``torch.save``, which may say ``model_state_dict``."""
    path = Path(path)
    content = read_safetensors(path)[0] if path.suffix == ".safetensors" else load_plain(path)
    if isinstance(content, dict):
        content = content.get("model_state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(each, Tensor) for each in content.values()):
        raise ArtifactError(f"{path}: holds no tensors by name: the trained parameters of a stage are wanted")
    return {str(name): tensor for name, tensor in content.items()}


def recognises(path: str | Path) -> bool:
    """Whether a file that can be read holds parameters of linear layers."""
    try:
        return all(_NAME.fullmatch(name) for name in read(path))
    except ArtifactError:
        return False


def adopt(
    name: str,
    checkpoints: Sequence[Mapping[str, Tensor]],
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    family: str = "lawcat",
    lora_alpha: float | None = None,
    **choices: Any,
) -> Lawcat:
    """A conversion from the stages' parameters, the later ones over the earlier.

    ``family``: "lawcat", or "lolcats": rotated, unscaled, the linear term for what has left the window. ``choices``:
    fields of ``LinearSpec`` that no tensor tells (``CHOICES``); a released LAWCAT has ``normalised`` and window 0.
    """
    if family not in FAMILIES:
        raise OptionError(f"family={family!r}: choose {' or '.join(FAMILIES)}")
    unknown = set(choices) - set(CHOICES)
    if unknown:
        raise OptionError(f"{sorted(unknown)[0]!r} is no choice here: known are {', '.join(CHOICES)}")
    heads = Heads.of(model.config.get_text_config(decoder=True))
    tensors = _renamed(checkpoints, heads, name)
    spec = _spec(tensors, heads, family, choices, name)
    if not spec.window and not spec.affine:
        # always saved, and unused then
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("window_factors")}
    return Lawcat.of(name, spec, tensors, model, tokenizer, low_rank=_low_rank(tensors, lora_alpha, name))


def published_names(lawcat: Lawcat) -> dict[str, Tensor]:
    """The conversion's tensors under LAWCAT's own names and shapes; LoRA as PEFT saves it."""
    theirs = {ours: name for name, ours in _OURS.items() if not name.startswith("gk_proj.")}
    gates = {"gate_down": "gk_proj.0.weight", "gate_up": "gk_proj.1.weight", "gate_bias": "gk_proj.1.bias"}
    if lawcat.spec.gate_rank is None:
        gates = {"gate_up": "gk_proj.weight", "gate_bias": "gk_proj.bias"}
    found = {}
    for key, tensor in lawcat.tensors.items():
        layer, _, ours = key.removeprefix("layers.").partition(".")
        if ".lora_" in ours:
            found[f"base_model.model.model.layers.{layer}.self_attn.{ours}.default.weight"] = tensor
            continue
        if ours.endswith("taps"):
            tensor = tensor.flatten(0, 1)[:, None]  # [H·D, 1, 4]
        elif ours == "window_factors":
            tensor = tensor.view(1, -1, 1, 1)
        found[f"model.layers.{layer}.self_attn.{(theirs | gates)[ours]}"] = tensor
    return found


def _renamed(checkpoints: Sequence[Mapping[str, Tensor]], heads: Heads, where: str) -> dict[str, Tensor]:
    """Our names and shapes; a name that means nothing to us is refused."""
    tensors: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        for name, tensor in checkpoint.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise ArtifactError(f"{where}: a tensor {name!r}, which is no parameter of a linear layer")
            layer, theirs = match.groups()
            if theirs in _UNUSED:
                continue
            lora = _LORA.fullmatch(theirs)
            ours = f"{lora[1]}.lora_{lora[2]}" if lora else _OURS.get(theirs)
            if ours is None:
                stacked = re.match(r"[qk]_conv1d\.", theirs)
                known = "only one conv of 4 taps without bias is read" if stacked else f"known are {', '.join(_OURS)}"
                raise ArtifactError(f"{where}: a tensor {name!r}: {known}")
            tensors[f"layers.{layer}.{ours}"] = _shaped(ours, tensor, heads, f"{where}: {name}")
    if not tensors:
        raise ArtifactError(f"{where}: no tensors of linear layers")
    return tensors


def _shaped(ours: str, tensor: Tensor, heads: Heads, where: str) -> Tensor:
    if ours.endswith("taps"):
        if tensor.ndim != 3 or tensor.shape[:2] != (heads.queries * heads.width, 1):
            raise ArtifactError(
                f"{where} is {list(tensor.shape)}: a depthwise conv of this model is "
                f"[{heads.queries * heads.width}, 1, taps]"
            )
        return tensor[:, 0].unflatten(0, (heads.queries, heads.width))
    return tensor.flatten() if ours == "window_factors" else tensor


def _spec(
    tensors: Mapping[str, Tensor], heads: Heads, family: str, choices: Mapping[str, Any], where: str
) -> LinearSpec:
    layers = tuple(sorted({int(name.split(".")[1]) for name in tensors if name.endswith("q_map")}))
    if not layers:
        raise ArtifactError(f"{where}: no feature map feature_map_q.mlp.layer: this is no LAWCAT or LoLCATs checkpoint")
    first = {
        name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layers[0]}.")
    }
    down = first.get("gate_down")
    seen: dict[str, Any] = {
        "layers": layers,
        "feature_size": first["q_map"].shape[-1],
        "tie_maps": "k_map" not in first,
        "conv_width": first["q_taps"].shape[-1] if "q_taps" in first else 0,
        "share_conv": "q_taps" in first and "k_taps" not in first,
        "gate_rank": down.shape[0] if down is not None else None if "gate_up" in first else 0,
    }
    if family == "lolcats":
        window = choices.get("window", 0)
        # beside a window the softmax term keeps the denominator from nothing
        seen |= {"rope": True, "scaled": False, "covers_window": not window, "eps": 0.0 if window else 1e-12}
    return LinearSpec.parse({**seen, **choices}, where)


def _low_rank(tensors: Mapping[str, Tensor], alpha: float | None, where: str) -> LowRank | None:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")}
    if not ranks:
        if alpha is not None:
            raise OptionError(f"lora_alpha={alpha} for {where}, which has no LoRA: leave it out")
        return None
    if alpha is None:
        raise OptionError(f"{where} has LoRA, whose alpha is not in the file: give lora_alpha (LoLCATs' recipe has 16)")
    if len(ranks) > 1:
        raise ArtifactError(f"{where}: LoRA of several ranks, {sorted(ranks)}: one is wanted")
    return LowRank(ranks.pop(), float(alpha))
