"""A masked-diffusion model ready to answer questions: loaded, read in both directions, with the length of its answers.

Knows names, folders and manifests. Does not know what is asked.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from accel.artifacts import Artifact, find_artifact, open_artifact
from accel.errors import ModelError
from accel.methods.dparallel.artifact import facts_in
from accel.models.diffusion import Denoiser, DiffusionFacts, facts_of
from accel.models.loading import load_model

# of answers, where no manifest says
_DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class Opened:
    """``max_new_tokens``: what the artifact was trained with. ``artifact``: None for a model that is none of ours."""

    name: str
    denoiser: Denoiser
    tokenizer: Any
    max_new_tokens: int
    artifact: Artifact | None

    @property
    def model(self) -> PreTrainedModel:
        return self.denoiser.model

    @property
    def facts(self) -> DiffusionFacts:
        return self.denoiser.facts

    def with_rule_of(self, facts: DiffusionFacts) -> Opened:
        """The same model, judged by the rule, threshold and strictness of other ``facts``."""
        named = {name: getattr(facts, name) for name in ("rule", "threshold", "strict")}
        return dataclasses.replace(self, denoiser=Denoiser(self.model, dataclasses.replace(self.facts, **named)))


def open_model(name_or_path: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> Opened:
    """An artifact of kind ``dparallel`` by id or folder, else any masked-diffusion model that ``load_model`` finds.

    An artifact's manifest and config must agree. ModelError for a causal model and for one without a tokenizer.
    """
    name = os.fspath(name_or_path)
    folder = find_artifact(name)
    artifact = None if folder is None else open_artifact(folder)
    facts = None if artifact is None else facts_in(artifact)
    model, tokenizer = load_model(folder or name, device=device, dtype=dtype)
    if tokenizer is None:
        raise ModelError(f"{name} brings no tokenizer: prompts cannot be read without one")
    denoiser = Denoiser(model, facts or masked_facts(model, name))
    return Opened(name, denoiser, tokenizer, _answer_length(artifact), artifact)


def masked_facts(model: PreTrainedModel, name: str) -> DiffusionFacts:
    """The model's own facts; ModelError, which calls it ``name``, where it has none."""
    facts = facts_of(model)
    if facts is None:
        raise ModelError(
            f"{name} is no masked-diffusion model (its config has no facts of one): make one of it with "
            "`accel distill a2d`"
        )
    return facts


def _answer_length(artifact: Artifact | None) -> int:
    trained = None if artifact is None else artifact.manifest.parameters.get("max_new_tokens")
    return trained if isinstance(trained, int) and trained > 0 else _DEFAULT_LENGTH
