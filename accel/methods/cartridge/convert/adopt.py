"""A foreign prefix as a cartridge of a model. The file says nothing of the model: whoever converts it does."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.errors import OptionError
from accel.methods.cartridge.cartridge import Cartridge, Geometry, Parameters, check_fits
from accel.methods.cartridge.convert.foreign import Foreign
from accel.models.row_cache import Segment


def adopt(
    foreign: Foreign,
    name: str,
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    template: str = "text",
    positions: int | None = None,
) -> Cartridge:
    """A live cartridge for ``model``, in its dtype; shapes that do not fit are refused with both values.

    ``positions``: of the next token, where the file does not say it. That it was made with the model's own rotation
    cannot be seen in keys: the caller vouches for it.
    """
    if positions is not None and foreign.num_positions not in (None, positions):
        raise OptionError(
            f"positions={positions}: {foreign.source} says that what follows stands at {foreign.num_positions}"
        )
    found = positions if foreign.num_positions is None else foreign.num_positions
    if found is None:
        raise OptionError(
            f"{foreign.source} does not say where the prompt behind it begins: give positions=, the tokens of the "
            "original context"
        )
    geometry = Geometry.of(model.config)
    keys = foreign.keys[0]
    own = dataclasses.replace(geometry, layers=len(foreign.keys), kv_heads=keys.shape[0], head_dim=keys.shape[2])
    stated = Parameters(keys.shape[1], found, foreign.sink_tokens, own, "float32", "converted", template)
    check_fits(stated, model.config, foreign.source)
    bias = foreign.bias
    segment = Segment(
        tuple(each.to(model.device, model.dtype) for each in foreign.keys),
        tuple(each.to(model.device, model.dtype) for each in foreign.values),
        found,
        None if bias is None else tuple(each.to(model.device, torch.float32) for each in bias),
    )
    made_by = f"converted:{foreign.details.get('format', 'unknown')}"
    return Cartridge.of(
        name, segment, model, tokenizer, method=made_by, template=template, sink_tokens=foreign.sink_tokens
    )
