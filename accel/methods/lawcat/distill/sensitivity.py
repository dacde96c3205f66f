"""What each layer costs: the rise of the held-out loss where it alone is converted. Knows models and rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from accel.methods.lawcat.distill.tune import measure
from accel.models.linear import Conversion, LinearSpec


def only(tensors: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of some layers."""
    return {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) in layers}


def rises(
    model: PreTrainedModel,
    spec: LinearSpec,
    tensors: Mapping[str, Tensor],
    rows: Sequence[Tensor],
    loss: float,
    file: Path,
    run: str,
    progress: Callable[[str], None],
) -> dict[int, float]:
    """By layer, nats above ``loss``, the softmax model's on ``rows``; kept in ``file`` for the same ``run``."""
    if file.exists() and (kept := json.loads(file.read_text(encoding="utf-8")))["run"] == run:
        return {int(layer): rise for layer, rise in kept["rises"].items()}
    found = {}
    for layer in spec.layers:
        progress(f"sensitivity: layer {layer} of {spec.layers[-1]}")
        alone = Conversion(model, dataclasses.replace(spec, layers=(layer,)), only(tensors, (layer,)))
        alone.install()
        try:
            found[layer] = round(measure(model, rows) - loss, 5)
        finally:
            alone.remove()
    # whole or absent
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"run": run, "rises": found}) + "\n", encoding="utf-8")
    new.replace(file)
    return found
