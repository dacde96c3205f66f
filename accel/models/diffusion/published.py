"""Loading what transformers has no class for, or would load as something else, without code of the checkpoint.

LLaDA, iLLaDA, Dream and a2d checkpoints become the causal class whose tensors they have; masked-LM folders keep their
class and gain ``generate``. Every tensor of a checkpoint is used and every weight of the model comes from it, or the
checkpoint is refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    GenerationConfig,
    GenerationMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from accel.errors import ModelError
from accel.models.diffusion.dream import dream_config
from accel.models.diffusion.facts import DiffusionFacts, facts_for, facts_of, set_facts
from accel.models.diffusion.llada import PREFIX, illada_config, llada_config, module_name

# finds a file of a folder or of the hub; None where there is none
Find = Callable[[str], Path | None]

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# how dllm's converted causal models call themselves: their family's name behind it
_A2D = "a2d-"
# what a config says of its file, not of the model
_NOT_OF_A2D = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Family:
    """How a published family becomes a class of transformers.

    ``rename``: one of its modules → ours, None where there is none. ``tokenizer``: the transformers class that reads
    its files, where AutoTokenizer would ask for the checkpoint's own code.
    """

    config: Callable[[Mapping[str, Any], str], Any]
    rename: Callable[[str], str | None]
    tokenizer: str | None


def _same_name(theirs: str) -> str:
    return theirs


def _a2d_config(raw: Mapping[str, Any], where: str) -> Any:
    family = raw["model_type"].removeprefix(_A2D)
    try:
        return AutoConfig.for_model(family, **{k: v for k, v in raw.items() if k not in _NOT_OF_A2D})
    except ValueError as error:
        raise ModelError(f"{where}: model_type is {raw['model_type']!r}, and transformers has no {family!r}") from error


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The published family that a ``config.json`` is of; None for everything that transformers loads by itself."""
    kind = config.get("model_type")
    if kind == "llada":
        return Family(llada_config, module_name, "PreTrainedTokenizerFast")
    if kind == "illada":
        return Family(illada_config, _same_name, "PreTrainedTokenizerFast")
    if kind == "Dream":
        return Family(dream_config, _same_name, "Qwen2TokenizerFast")
    if isinstance(kind, str) and kind.startswith(_A2D):
        return Family(_a2d_config, _same_name, None)
    return None


def load_published(raw: Mapping[str, Any], family: Family, find: Find, where: str, dtype: torch.dtype | None) -> Any:
    """The model of a published checkpoint on the CPU, with its facts in its config. ``dtype`` None: its own."""
    facts = facts_for(raw, where)
    config = family.config(raw, where)
    # ends and padding are facts; what is left of the checkpoint's own ids is its first token
    config.eos_token_id = list(facts.stop_tokens) or None
    config.pad_token_id = facts.pad_token
    config.bos_token_id = raw.get("bos_token_id")
    tensors = _renamed(_read(find, where), family, where)
    if config.tie_word_embeddings:
        _drop_tied_head(tensors, where)
    kind = dtype or next(iter(tensors.values())).dtype
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, said = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=kind, output_loading_info=True)
    _refuse_gaps(said, where)
    model.config.name_or_path = model.name_or_path = where
    set_facts(model, facts)
    return model


def is_masked_lm_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a masked-LM class of transformers."""
    names: set[str] = set()
    for value in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        names |= {value} if isinstance(value, str) else set(value)
    return any(name in names for name in config.get("architectures") or ())


def load_masked_lm(raw: Mapping[str, Any], name: str, dtype: torch.dtype | None, local_only: bool) -> Any:
    """A masked-LM checkpoint that says what it is, as its own class with ``generate``."""
    facts_for(raw, name)
    model, said = AutoModelForMaskedLM.from_pretrained(
        name, dtype=dtype or "auto", trust_remote_code=False, local_files_only=local_only, output_loading_info=True
    )
    _refuse_gaps({"missing_keys": said["missing_keys"], "mismatched_keys": said["mismatched_keys"]}, name)
    facts = facts_of(model)
    assert facts is not None, "transformers keeps fields of a config that it does not know"
    return with_generate(model, facts)


def with_generate(model: Any, facts: DiffusionFacts) -> Any:
    """The same model; where its class has no ``generate()``, it becomes one of a class that has."""
    if not isinstance(model, GenerationMixin):
        kind: Any = type(model)
        model.__class__ = _generating(kind)
        model.generation_config = GenerationConfig(
            eos_token_id=list(facts.stop_tokens) or None, pad_token_id=facts.pad_token
        )
    return model


@functools.cache
def _generating(cls: Any) -> Any:
    # the name is saved as the architecture, by which the folder is loaded again
    return type(cls.__name__, (cls, GenerationMixin), {"__module__": cls.__module__})


def _read(find: Find, where: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or several; read from disk as they are used."""
    from safetensors import safe_open

    index, whole = find(_INDEX), find(_WEIGHTS)
    if index is not None:
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{where}: {_INDEX} is not an index of files") from error
        if not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise ModelError(f"{where}: {_INDEX} names files outside the checkpoint's folder")
        paths = {file: find(file) for file in files}
    else:
        paths = {_WEIGHTS: whole}
    tensors: dict[str, Tensor] = {}
    for file, path in paths.items():
        if path is None:
            # an OSError: of a hub model that is here in part, the rest can be fetched
            raise FileNotFoundError(f"no file {file}: weights are read from safetensors only")
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no mapping
                tensors[name] = opened.get_tensor(name)
    if not tensors:
        raise ModelError(f"{where}: no tensors in {', '.join(paths)}")
    return tensors


def _renamed(tensors: Mapping[str, Tensor], family: Family, where: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        ours = family.rename(module)
        if ours is None:
            raise ModelError(f"{where}: a tensor {name!r}, which no {PREFIX}… of this family has")
        renamed[f"{ours}.{parameter}"] = tensor
    return renamed


def _drop_tied_head(tensors: dict[str, Tensor], where: str) -> None:
    """A tied head is saved by some; one of its own would be lost."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if not torch.equal(head, embedding):
        raise ModelError(
            f"{where}: its config ties the head to the embedding, and the two differ: set tie_word_embeddings "
            "(weight_tying) to false in its config.json"
        )
    del tensors["lm_head.weight"]


def _refuse_gaps(said: Mapping[str, Any], where: str) -> None:
    for what, kind in (("missing", "missing_keys"), ("not of the model", "unexpected_keys")):
        names = sorted(said.get(kind) or ())
        if names:
            raise ModelError(f"{where}: {len(names)} tensors are {what}, such as {names[0]}")
    if said.get("mismatched_keys"):
        raise ModelError(
            f"{where}: tensors of other shapes than its config says, such as {next(iter(said['mismatched_keys']))}"
        )
