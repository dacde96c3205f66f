"""Gated linear attention in the place of a model's softmax layers (LAWCAT): the layer, and a target with its state."""

from __future__ import annotations

from transformers import PreTrainedModel

from accel.models.linear.convert import (
    Conversion,
    LowRank,
    check_weights,
    converted_copy,
    fresh_layers,
    is_linear,
    linear_layers,
    own_parameters,
    softmax_attention,
    weight_shapes,
)
from accel.models.linear.spec import FAMILIES, Heads, LinearSpec
from accel.models.linear.target import LinearTarget
from accel.models.softmax_target import SoftmaxTarget

__all__ = [
    "FAMILIES",
    "Conversion",
    "Heads",
    "LinearSpec",
    "LinearTarget",
    "LowRank",
    "check_weights",
    "converted_copy",
    "fresh_layers",
    "is_linear",
    "linear_layers",
    "own_parameters",
    "softmax_attention",
    "target_for",
    "weight_shapes",
]


def target_for(model: PreTrainedModel) -> SoftmaxTarget:
    """What the rows of ``model`` are read with: states where it has linear layers, keys and values where not."""
    return LinearTarget(model) if is_linear(model) else SoftmaxTarget(model)
