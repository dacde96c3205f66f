"""Hidden states of chosen layers of a target, kept per row until a drafter takes them. Knows nothing of drafting.

Hooks are on the layers for the length of a forward pass only: between two passes the model is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.errors import ModelError


class LayerTap:
    """What ``project`` makes of ``hidden_states[id]`` for each id, at the committed positions of every row.

    Implements ``accel.models.softmax_target.Tap``. Projecting early keeps one hidden size a position, not several.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int], project: Callable[[Tensor], Tensor]) -> None:
        self._layers = decoder_layers(model)
        self._ids = tuple(layer_ids)
        self._project = project
        # row → features [n, H] of a forward pass each: those not committed yet, and those nobody has taken yet
        self._tentative: dict[int, list[Tensor]] = {}
        self._kept: dict[int, list[Tensor]] = {}

    @contextmanager
    def listening(self, rows: Sequence[int]) -> Iterator[None]:
        """Around one forward pass over ``rows``."""
        heard: dict[int, Tensor] = {}
        hooks = [self._hook(id, heard) for id in self._ids]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        last = heard[self._ids[-1]].device
        features = self._project(torch.cat([heard[id].to(last) for id in self._ids], dim=-1))  # [R, n, H]
        for row, own in zip(rows, features, strict=True):
            self._tentative.setdefault(row, []).append(own)

    def commit(self, rows: Sequence[int], keep: Sequence[int]) -> None:
        for row, count in zip(rows, keep, strict=True):
            tentative = self._tentative.pop(row, [])
            if count:
                # a copy: a slice would hold the whole batch's features in memory
                joined = tentative[0] if len(tentative) == 1 else torch.cat(tentative)
                self._kept.setdefault(row, []).append(joined[:count].clone())

    def fork(self, row: int, copies: Iterable[int]) -> None:
        for copy in copies:
            self._kept[copy] = list(self._kept.get(row, ()))

    def close(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._tentative.pop(row, None)
            self._kept.pop(row, None)

    def take(self, row: int) -> Tensor | None:
        """The row's features since they were last taken ``[n, H]``, None where there are none."""
        kept = self._kept.pop(row, None)
        return torch.cat(kept) if kept else None

    def nbytes(self) -> int:
        """Memory held; what forks share counts once."""
        held = {id(t): t for pieces in (*self._kept.values(), *self._tentative.values()) for t in pieces}
        return sum(t.numel() * t.element_size() for t in held.values())

    def _hook(self, id: int, heard: dict[int, Tensor]) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard[id] = args[0] if args else kwargs["hidden_states"]

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            heard[id] = output if isinstance(output, Tensor) else output[0]

        if id == 0:
            return self._layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        return self._layers[id - 1].register_forward_hook(leave)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's decoder layers, in order."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    found = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: {len(found)} lists of {count} decoder layers found where one is needed: an "
            "EAGLE-3 head cannot read this target; use a draft model"
        )
    return found[0]
