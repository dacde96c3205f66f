"""A masked-diffusion model as an artifact: the folder that transformers would save, and what it was made of.

Knows files and manifests. Does not know how the model was trained.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from accel.artifacts import Artifact, BaseModel, Manifest, save, saved_files, update
from accel.distill.weights import DTYPES
from accel.errors import ArtifactError
from accel.models.aliases import progress_only_on_terminal
from accel.models.diffusion import CONFIG_KEY, DiffusionFacts, set_facts

KIND = "dparallel"
CONFIG = "config.json"
_SHARD = "4GB"


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    facts: DiffusionFacts,
    *,
    work: Path,
    base: BaseModel,
    dtype: str,
    parameters: Mapping[str, Any],
    made: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Artifact:
    """Save ``model`` with its ``facts``; ``accel.load(folder)`` and transformers read it from there.

    ``base``: the model that it was made from. ``work``: where transformers saves first; that copy is deleted again.
    """
    set_facts(model, facts)
    draft = work / "saved"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        saved = model.to(DTYPES[dtype])
        with progress_only_on_terminal():
            saved.save_pretrained(draft, max_shard_size=_SHARD)
        tokenizer.save_pretrained(draft)
        tensors, texts = saved_files(draft)
        manifest = Manifest(
            kind=KIND,
            base=base,
            parameters={"facts": facts.as_dict(), **parameters},
            made=dict(made),
            measured=dict(measured),
        )
        return save(folder, manifest, tensors, texts)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def facts_in(artifact: Artifact) -> DiffusionFacts:
    """The facts of an artifact's manifest; those of its config must be the same."""
    if artifact.kind != KIND:
        raise ArtifactError(f"{artifact.path} is an artifact of kind {artifact.kind}: this needs one of kind {KIND}")
    where = f"{artifact.path}: parameters.facts"
    facts = DiffusionFacts.parse(artifact.manifest.parameters.get("facts"), where)
    config = json.loads(artifact.file(CONFIG).read_text(encoding="utf-8"))
    found = DiffusionFacts.parse(config.get(CONFIG_KEY), f"{artifact.path}/{CONFIG}: {CONFIG_KEY}")
    for field in dataclasses.fields(facts):
        ours, theirs = getattr(facts, field.name), getattr(found, field.name)
        if ours != theirs:
            raise ArtifactError(
                f"{artifact.path}: {field.name} is {ours!r} in the manifest and {theirs!r} in {CONFIG}: make it again"
            )
    return facts


def set_threshold(
    artifact: Artifact, threshold: float, measured: Mapping[str, Any], made: Mapping[str, Any]
) -> Artifact:
    """Write another threshold into the manifest and the config, together or not at all."""
    facts = dataclasses.replace(facts_in(artifact), threshold=threshold)
    config = json.loads(artifact.file(CONFIG).read_text(encoding="utf-8"))
    config[CONFIG_KEY] = facts.as_dict()
    manifest = dataclasses.replace(
        artifact.manifest,
        parameters=artifact.manifest.parameters | {"facts": facts.as_dict()},
        measured=artifact.manifest.measured | dict(measured),
        made=artifact.manifest.made | dict(made),
    )
    return update(artifact, manifest, {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"})
