"""A draft model as an artifact: its config and weights, and which of the target's tokens it can say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from accel.artifacts import Artifact
from accel.drafters.small_lm import VocabularyMap
from accel.errors import ArtifactError
from accel.models import lagged

KIND = "draft"
MODEL, VOCABULARY = "model.safetensors", "vocabulary.safetensors"


def load(
    artifact: Artifact, target_vocab_size: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, VocabularyMap | None]:
    """The draft, on the CPU, and its vocabulary where it is only part of the target's.

    The manifest's parameters hold the draft's ``config`` and, for a trimmed vocabulary, ``unknown``.
    """
    parameters: dict[str, Any] = dict(artifact.manifest.parameters)
    config = AutoConfig.for_model(**parameters["config"])
    draft = lagged.install(AutoModelForCausalLM.from_config(config, dtype=dtype))
    found = draft.load_state_dict(artifact.tensors(MODEL), strict=False)
    missing = set(found.missing_keys) - set(getattr(draft, "_tied_weights_keys", None) or ())
    if missing or found.unexpected_keys:
        raise ArtifactError(
            f"{artifact.path.name}: the weights do not fit the config: missing {sorted(missing)[:3]}, "
            f"unknown {sorted(found.unexpected_keys)[:3]}"
        )
    draft.tie_weights()
    vocabulary = None
    if VOCABULARY in artifact.manifest.files:
        d2t: Tensor = artifact.tensors(VOCABULARY)["d2t"]
        vocabulary = VocabularyMap(d2t, int(parameters["unknown"]), target_vocab_size)
    return draft.eval(), vocabulary
