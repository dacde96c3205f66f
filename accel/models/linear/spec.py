"""What a model's linear attention is made of: which layers, which conv, map, gate and window. Frozen and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from accel.errors import ArtifactError, IncompatibleError

# whose attention is q, k, v and o projections (and norms of q and k) around one softmax: tests prove each
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CONV_WIDTH = 4
ACTIVATIONS = (None, "silu")


@dataclass(frozen=True)
class LinearSpec:
    """The form of the linear layers of a model (LAWCAT, arXiv 2509.18467), the same for all of them."""

    # numbers of the layers whose softmax is replaced, rising; the others stay as they are
    layers: tuple[int, ...]
    # f of the maps W [H, D, f]; the features are 2f
    feature_size: int
    # taps of the causal conv on q and k: 4, or 0 for none
    conv_width: int = CONV_WIDTH
    share_conv: bool = False
    tie_maps: bool = False
    # behind the conv
    activation: str | None = None
    # None: one full matrix; 0: nothing is ever forgotten
    gate_rank: int | None = 16
    gate_normalizer: float = 16.0
    # lower bound of a step's log decay
    min_log_decay: float | None = None
    # divided by the denominator, as published
    normalised: bool = True
    # tokens of softmax beside the linear term, under one denominator; 0: none
    window: int = 0
    # the linear term weighs 1 - sigmoid(window_factors) instead of 1
    affine: bool = False
    # the linear term counts the window's tokens too; if not, only those before it (LoLCATs)
    covers_window: bool = True
    # queries times K^-0.5, which matters beside a window only (LoLCATs has none)
    scaled: bool = True
    # rotated q and k in the linear term (LoLCATs; LAWCAT has none)
    rope: bool = False
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ArtifactError(f"layers={list(self.layers)}: give the numbers of one layer or more, rising from 0")
        if self.feature_size < 1:
            raise ArtifactError(f"feature_size={self.feature_size}: must be 1 or more (half the head's width)")
        if self.conv_width not in (0, CONV_WIDTH):
            raise ArtifactError(f"conv_width={self.conv_width}: must be {CONV_WIDTH}, or 0 for no conv")
        if self.activation not in ACTIVATIONS or (self.activation and not self.conv_width):
            raise ArtifactError(
                f"activation={self.activation!r}, conv_width={self.conv_width}: choose None, or 'silu' behind a conv"
            )
        if self.gate_rank is not None and self.gate_rank < 0:
            raise ArtifactError(f"gate_rank={self.gate_rank}: must be 1 or more, None for a full matrix, 0 for no gate")
        if not self.gate_normalizer > 0:
            raise ArtifactError(f"gate_normalizer={self.gate_normalizer}: must be positive (LAWCAT's is 16)")
        if self.min_log_decay is not None and not self.min_log_decay <= 0:
            raise ArtifactError(f"min_log_decay={self.min_log_decay}: log decays are at most 0; give less, or None")
        if self.window < 0:
            raise ArtifactError(f"window={self.window}: must be 0 (no softmax window) or more")
        if self.window and not self.normalised:
            raise ArtifactError(f"window={self.window} without normalised: the window shares the linear denominator")
        if not self.covers_window and (not self.window or self.conv_width or self.gate_rank != 0):
            raise ArtifactError(
                f"covers_window=False with window={self.window}, conv_width={self.conv_width}, gate_rank="
                f"{self.gate_rank}: keys that enter late need a window, and have neither conv nor gate (0 and 0)"
            )
        if self.share_conv and not self.conv_width:
            raise ArtifactError("share_conv without a conv: set conv_width to 4, or share_conv to false")
        if self.rope and self.conv_width:
            raise ArtifactError("rope with a conv: rotated queries and keys are not convolved; set conv_width to 0")
        if not self.eps >= 0:
            raise ArtifactError(f"eps={self.eps}: must be 0 or more")

    @property
    def is_fraction(self) -> bool:
        """Whether the output is the kernel's own fraction, numerator over denominator plus eps."""
        return self.normalised and not self.window and not self.affine

    @property
    def remembered(self) -> int:
        """Tokens whose rotated keys and values are kept beside the state."""
        return 0 if not self.window else self.window - 1 if self.covers_window else self.window

    @property
    def scale(self) -> float | None:
        """What the kernels multiply queries with; None for their own K^-0.5."""
        return None if self.scaled else 1.0

    @property
    def needs_rotation(self) -> bool:
        return self.rope or self.window > 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> LinearSpec:
        """From a manifest; ArtifactError names what is wrong."""
        try:
            given = dict(raw)
            given["layers"] = tuple(given["layers"])
            _check_types(given)
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{where}: parameters of no linear attention: {error}") from error
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from None

    def check_fits(self, config: PreTrainedConfig, where: str = "linear attention") -> Heads:
        """The model's heads; refused where the model has another form than this was made for."""
        text = config.get_text_config(decoder=True)
        if text.model_type not in FAMILIES:
            raise IncompatibleError(
                f"{where}: the model is a {text.model_type}, and linear attention is for {', '.join(FAMILIES)}"
            )
        if self.layers[-1] >= text.num_hidden_layers:
            raise IncompatibleError(
                f"{where}: layer {self.layers[-1]} of a model that has {text.num_hidden_layers}: numbers go up to "
                f"{text.num_hidden_layers - 1}"
            )
        heads = Heads.of(text)
        if 2 * self.feature_size != heads.width:
            raise IncompatibleError(
                f"{where}: feature_size {self.feature_size} for heads of {heads.width}: 2 · feature_size must be the "
                f"head's width, as the gate has a channel a feature; use {heads.width / 2:g}"
            )
        return heads


@dataclass(frozen=True)
class Heads:
    """A model's attention heads: H of queries, H_kv of keys and values, each ``width`` D; and its hidden size."""

    queries: int
    keys: int
    width: int
    hidden: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Heads:
        queries = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        return cls(queries, getattr(config, "num_key_value_heads", None) or queries, width, config.hidden_size)


_TYPES: dict[str, tuple[type, ...]] = {
    "feature_size": (int,),
    "conv_width": (int,),
    "share_conv": (bool,),
    "tie_maps": (bool,),
    "activation": (str, type(None)),
    "gate_rank": (int, type(None)),
    "gate_normalizer": (int, float),
    "min_log_decay": (int, float, type(None)),
    "normalised": (bool,),
    "window": (int,),
    "affine": (bool,),
    "covers_window": (bool,),
    "scaled": (bool,),
    "rope": (bool,),
    "eps": (int, float),
}


def _check_types(raw: Mapping[str, Any]) -> None:
    if not all(type(each) is int for each in raw["layers"]):
        raise TypeError(f"layers is {raw['layers']!r}, whole numbers are wanted")
    for name, kinds in _TYPES.items():
        if name in raw and type(raw[name]) not in kinds:
            raise TypeError(f"{name} is {raw[name]!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
