"""What the config.json of a draft head says, in one form for both published layouts. Knows no weights and no target.

speculators' layout nests the decoder layer's sizes in ``transformer_layer_config``; that of SafeAILab, SpecForge and
Model-Optimizer is the config of a llama of one layer with a few more keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from accel.errors import ArtifactError
from accel.models.attention import supports_rows

# decoder layers that a head may be made of
LAYER_TYPES = ("llama", "qwen3")
# parts of architecture names by which drafters of every kind are known
_DRAFTER_NAMES = ("eagle", "dflash", "dspark", "medusa", "speculator")
# about files and their making, or about a whole model: nothing a layer needs
_NOT_OF_A_LAYER = frozenset(
    "architectures auto_map dtype eagle_config model_type quantization_config torch_dtype transformers_version".split()
)


@dataclass(frozen=True)
class HeadConfig:
    """A head's sizes and switches. ``layer``: a transformers config whose decoder layers are the head's own.

    ``layer_ids`` says which of the target's ``hidden_states`` are read, None for the usual three: (2, n/2, n − 3) of n
    layers. The last, n, is what the final norm reads.
    """

    where: str
    layer: PreTrainedConfig
    draft_vocab_size: int
    target_hidden_size: int
    layer_ids: tuple[int, ...] | None
    # the first layer's residual is the normalised feature
    norm_before_residual: bool
    # one norm over the concatenated hidden states, or one for each of them
    norm_before_fc: bool
    fc_norm: bool
    # between draft steps the normalised output is fed back
    norm_output: bool

    @property
    def num_taps(self) -> int:
        """How many hidden states of the target make one feature."""
        return 3 if self.layer_ids is None else len(self.layer_ids)


def is_head(folder: Path) -> bool:
    """Whether a folder's config.json is that of a draft head, of a kind known here or not, and not of a whole model."""
    raw = _read_json(folder)
    named = any(part in name for name in _names(raw) for part in _DRAFTER_NAMES)
    return named or "speculators_model_type" in raw or "draft_vocab_size" in raw


def read_config(folder: Path) -> HeadConfig:
    """The config of an EAGLE-3 head; one sentence for anything else."""
    raw = _read_json(folder)
    kind = _kind(raw)
    if kind != "eagle3":
        raise ArtifactError(f"{folder}: is a drafter of type {kind!r}: accel runs draft heads of type 'eagle3'")
    by_speculators = "speculators_model_type" in raw
    layer_keys: dict[str, Any] = raw.get("transformer_layer_config") or {} if by_speculators else raw
    if "quantization_config" in raw or "quantization_config" in layer_keys:
        raise ArtifactError(f"{folder}: the draft head is quantised: give an unquantised one (fp32, fp16 or bf16)")
    nested: dict[str, Any] = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise ArtifactError(
            f"{folder}: the head reads the target's last hidden state alone (use_aux_hidden_state is false): accel "
            "runs EAGLE-3 heads that read several"
        )

    def switch(name: str) -> bool:
        return bool(raw.get(name, nested.get(name, False)))

    layer = _layer_config(folder, layer_keys)
    return HeadConfig(
        where=str(folder),
        layer=layer,
        draft_vocab_size=_size(folder, raw, "draft_vocab_size", layer.vocab_size),
        target_hidden_size=_size(folder, raw, "target_hidden_size", layer.hidden_size),
        layer_ids=_layer_ids(folder, raw, nested),
        norm_before_residual=switch("norm_before_residual"),
        norm_before_fc=switch("norm_before_fc"),
        fc_norm=switch("fc_norm"),
        norm_output=switch("norm_output"),
    )


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: holds a {type(raw).__name__}: a config is an object")
    return raw


def _names(raw: dict[str, Any]) -> list[str]:
    return [str(name).lower() for name in (*(raw.get("architectures") or ()), raw.get("model_type", ""))]


def _kind(raw: dict[str, Any]) -> str:
    if "speculators_model_type" in raw:
        return str(raw["speculators_model_type"])
    named = [name for name in _names(raw) if any(part in name for part in _DRAFTER_NAMES)]
    # SafeAILab's own heads are called LlamaForCausalLM, and have a draft vocabulary since EAGLE-3
    return "eagle3" if not named or any("eagle3" in name for name in named) else named[0]


def _size(folder: Path, raw: dict[str, Any], name: str, default: int) -> int:
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArtifactError(f"{folder}: config.json: {name}={value!r}: must be a whole number ≥ 1")
    return value


def _layer_ids(folder: Path, raw: dict[str, Any], nested: dict[str, Any]) -> tuple[int, ...] | None:
    name = "eagle_aux_hidden_state_layer_ids"
    # in eagle_config an id names the layer whose output is read, which is one less
    shift = 0 if raw.get(name) else 1
    ids = raw.get(name) or nested.get(name)
    if not ids:
        return None
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise ArtifactError(f"{folder}: config.json: {name}={ids!r}: must be a list of whole numbers")
    return tuple(id + shift for id in ids)


def _layer_config(folder: Path, keys: dict[str, Any]) -> PreTrainedConfig:
    # null stands for "not given" in these files, and transformers refuses it in typed fields
    keys = {name: value for name, value in keys.items() if value is not None}
    model_type = keys.get("model_type", "llama")
    if model_type not in LAYER_TYPES:
        known = " and ".join(LAYER_TYPES)
        raise ArtifactError(f"{folder}: the head's layer is of type {model_type!r}: accel knows {known} layers")
    missing = sorted({"hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"} - set(keys))
    if missing:
        raise ArtifactError(f"{folder}: config.json does not say {missing[0]}: it is not the config of an EAGLE-3 head")
    keys.setdefault("num_hidden_layers", 1)
    if "layer_types" in keys:
        # copied from the target's config in some heads, one entry a layer of the target
        keys["layer_types"] = keys["layer_types"][: keys["num_hidden_layers"]]
    given = {name: value for name, value in keys.items() if name not in _NOT_OF_A_LAYER}
    try:
        config = AutoConfig.for_model(model_type, **given)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: config.json: {str(error).splitlines()[0]}") from error
    if not supports_rows(config):
        raise ArtifactError(f"{folder}: layer_types={config.layer_types}: accel knows full and sliding attention")
    return config
