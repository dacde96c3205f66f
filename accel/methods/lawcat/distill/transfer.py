"""Stage 1, attention transfer: every linear layer learns what the softmax layer beside it hands to o_proj.

The teacher alone runs, so that each layer learns behind the teacher's layers and not behind what others have learned
so far. Knows layers and rows of tokens. Does not know texts or artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.distill.descent import Row
from accel.methods.lawcat.distill.stage import Stage, descend, pieces
from accel.methods.lawcat.distill.texts import Rows
from accel.models.linear import own_parameters, softmax_attention
from accel.models.linear.layer import LinearAttention
from accel.models.linear.memory import attend

# of the mean square error (the authors' configuration; it sets where clipping begins)
WEIGHT = 1000.0


class Seen(NamedTuple):
    """One softmax layer in a forward pass: its inputs [B, T, hidden], rotations, and its heads' outputs [B, T, H·D]."""

    hidden: Tensor
    positions: tuple[Tensor, Tensor] | None
    heads: Tensor


@torch.no_grad()
def watch(model: PreTrainedModel, layers: Sequence[LinearAttention], tokens: Tensor) -> list[Seen]:
    """What the softmax layers beside ``layers`` see and say of ``tokens`` [B, T], in one forward of ``model``."""
    given: dict[int, tuple[Tensor, Any]] = {}
    said: dict[int, Tensor] = {}
    hooks = []
    for layer in layers:
        module, index = softmax_attention(model, layer.layer_idx), layer.layer_idx

        def before(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            given[index] = hidden, kwargs.get("position_embeddings")

        def inside(_: Any, args: Any, index: int = index) -> None:
            said[index] = args[0]

        hooks += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.o_proj.register_forward_pre_hook(inside),
        ]
    try:
        # without the head
        model.get_decoder()(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [Seen(*given[layer.layer_idx], said[layer.layer_idx]) for layer in layers]


def difference(layer: LinearAttention, seen: Seen) -> Tensor:
    """Linear less softmax, before o_proj: fp32 [B, T, H·D], with a gradient where gradients are on."""
    out, _ = attend(layer, layer.project(seen.hidden, seen.positions), None)
    return out.flatten(2).float() - seen.heads.float()


def losses(model: PreTrainedModel, layers: Sequence[LinearAttention], tokens: Tensor) -> Iterator[Tensor]:
    """``WEIGHT`` times the mean square error over tokens [B, T] and layers, layer by layer: one graph at a time."""
    for piece in pieces(tokens):
        share = len(piece) / len(tokens) / len(layers)
        for layer, seen in zip(layers, watch(model, layers, piece), strict=True):
            yield WEIGHT * share * difference(layer, seen).square().mean()


def train(
    model: PreTrainedModel,
    layers: Sequence[LinearAttention],
    rows: Rows,
    how: Stage,
    folder: Path,
    *,
    made_from: Mapping[str, Any],
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[Row]:
    """Train the layers' own parameters in place; see ``stage.descend``."""
    learner = nn.ParameterList(own_parameters(layers).values())
    return descend(
        learner,
        model,
        rows,
        how,
        folder,
        lambda tokens: losses(model, layers, tokens),
        made_from=made_from,
        progress=progress,
    )


@torch.no_grad()
def errors(model: PreTrainedModel, layers: Sequence[LinearAttention], rows: Sequence[Tensor]) -> list[float]:
    """Of each layer, over ``rows`` [T] each: RMS of the difference over RMS of what the softmax layer says."""
    wrong, size = torch.zeros(len(layers), dtype=torch.float64), torch.zeros(len(layers), dtype=torch.float64)
    for row in rows:
        for place, seen in enumerate(watch(model, layers, row[None].to(model.device))):
            wrong[place] += difference(layers[place], seen).square().sum().item()
            size[place] += seen.heads.float().square().sum().item()
    return [round(each, 5) for each in (wrong / size).sqrt().tolist()]
