"""Digests that say whether two files, model configurations or tokenizers are the same.

Takes transformers objects by their methods alone and imports nothing of transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.artifacts.manifest import BaseModel
from accel.errors import ArtifactError

# What can change without the network computing anything else: where it came from, in which precision it is held,
# how its outputs are packed, special token ids, which belong to generation (people set pad_token_id by hand), and how
# a masked-diffusion model is decoded.
_VOLATILE_KEYS = frozenset(
    {
        "transformers_version",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "architectures",
        "auto_map",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "sep_token_id",
        "accel_diffusion",
    }
)


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_digest(config: Any) -> str:
    """sha256 of a model configuration (a transformers config or its dict), without the volatile keys."""
    raw = config if isinstance(config, Mapping) else config.to_dict()
    return json_digest(stable_settings(raw))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: its serialised backend where there is one, else its sorted vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json_digest(sorted(tokenizer.get_vocab().items()))
    state = json.loads(backend.to_str())
    # these two are the settings of the last call with padding=True or truncation=True, not part of the tokenizer
    for name in ("padding", "truncation"):
        state.pop(name, None)
    return json_digest(state)


def vocabulary_size(config: Any) -> int:
    """The number of logits of the language model inside ``config``."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ArtifactError(f"the configuration {type(config).__name__} names no vocab_size: not a language model")
    return size


def describe_base(
    config: Any, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None
) -> BaseModel:
    """The manifest's entry for a model that an artifact is being made for; ``name`` None is what its config says."""
    return BaseModel(
        name=name or getattr(config, "_name_or_path", None) or "unnamed",
        revision=revision,
        config_digest=config_digest(config),
        tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
        vocab_size=vocabulary_size(config),
    )


def stable_settings(value: Any) -> Any:
    """Drop volatile and private keys and nulls (a newer library adds optional fields as null), at every depth."""
    if isinstance(value, Mapping):
        items = ((str(key), item) for key, item in value.items())
        return {k: stable_settings(v) for k, v in items if k not in _VOLATILE_KEYS and k[:1] != "_" and v is not None}
    if isinstance(value, (list, tuple)):
        return [stable_settings(item) for item in value]
    # 10000 and 10000.0 are one setting, written differently by different savers
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def json_digest(value: Any) -> str:
    """sha256 of a value as JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
