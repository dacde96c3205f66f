"""Gated linear attention in the place of a model's softmax layers (LAWCAT): the layer, and a target with its state."""

from __future__ import annotations

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
    "weight_shapes",
]
