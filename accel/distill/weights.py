"""The weights that a recipe starts from and those that it saves: which checkpoint it was, and in what precision."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from accel.artifacts import BaseModel

# what a recipe may save in
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def describe_teacher(base: BaseModel, model: PreTrainedModel) -> dict[str, str | None]:
    """What a manifest says of the model that was learned from: ``base``, and which checkpoint of it."""
    return {"name": base.name, "config_digest": base.config_digest, "weights_digest": weights_digest(model)}


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over a model's tensors, by name: what the config's digest cannot tell, which checkpoint it was."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        found.update(plain.flatten().view(torch.uint8).numpy())
    return found.hexdigest()
