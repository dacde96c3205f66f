"""What decoding must know of a masked-diffusion checkpoint, and where it is written down.

Facts come from the checkpoint's own ``config.json`` (an object under ``accel_diffusion``) or from the table of
published checkpoints, told apart by their configs. Knows no tensors and loads nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import ArtifactError, ModelError, OptionError, unknown_name
from accel.kernels.unmask import RULES

# where a config keeps them: transformers saves fields that it does not know with the others
CONFIG_KEY = "accel_diffusion"


def _is_token(value: object) -> bool:
    return type(value) is int and value >= 0


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(_is_token(each) for each in value):
        raise OptionError(f"{name}={value!r}: must be a list of token ids, integers ≥ 0")
    return tuple(value)


@dataclass(frozen=True)
class DiffusionFacts:
    """What decoding must know of a checkpoint, and must never guess."""

    # the token that stands for "not decided yet"
    mask_token: int
    # the logits of position i predict token i + 1 (Dream, which was made from a causal model)
    shift: bool = False
    # positions that are decided together, left to right
    block_length: int = 32
    # one of accel.kernels.unmask.RULES
    rule: str = "entropy"
    # nats for "entropy", a probability for "confidence"; the other rules have none
    threshold: float = 0.5
    # < and > instead of ≤ and ≥
    strict: bool = False
    # any of them ends the text
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    def __post_init__(self) -> None:
        if not _is_token(self.mask_token):
            raise OptionError(f"mask_token={self.mask_token!r}: must be a token id, an integer ≥ 0")
        for name in ("shift", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: must be true or false")
        if type(self.block_length) is not int or self.block_length < 1:
            raise OptionError(f"block_length={self.block_length!r}: must be an integer ≥ 1")
        if self.rule not in RULES:
            raise OptionError(unknown_name("rule", str(self.rule), RULES))
        if type(self.threshold) not in (int, float) or math.isnan(self.threshold):
            raise OptionError(f"threshold={self.threshold!r}: must be a number (nats or a probability, by the rule)")
        # JSON has lists and no tuples
        object.__setattr__(self, "stop_tokens", _tokens("stop_tokens", self.stop_tokens))
        if self.pad_token is not None and not _is_token(self.pad_token):
            raise OptionError(f"pad_token={self.pad_token!r}: must be a token id, an integer ≥ 0, or None")
        if self.mask_token in self.stop_tokens:
            raise OptionError(f"mask_token={self.mask_token}: it is a stop token too; a mask is never output")

    def check(self, config: Any) -> None:
        """ModelError where the facts cannot be true of the model of ``config``."""
        vocab_size = config.get_text_config(decoder=True).vocab_size
        named = {"mask_token": self.mask_token, "pad_token": self.pad_token}
        named |= {f"stop_tokens[{i}]": token for i, token in enumerate(self.stop_tokens)}
        for name, token in named.items():
            if token is not None and token >= vocab_size:
                raise ModelError(
                    f"{CONFIG_KEY}: {name} is {token}, the model has {vocab_size} tokens (0 to {vocab_size - 1}): "
                    "these facts are of another model"
                )
        stated = getattr(config, "mask_token_id", None)
        if stated is not None and stated != self.mask_token:
            raise ModelError(
                f"{CONFIG_KEY}: mask_token is {self.mask_token}, the model's config says mask_token_id {stated}: "
                "correct the one that is wrong"
            )

    def as_dict(self) -> dict[str, Any]:
        """For a config or a manifest; ``parse`` reads it back."""
        return dataclasses.asdict(self) | {"stop_tokens": list(self.stop_tokens)}

    @classmethod
    def parse(cls, raw: object, where: str = CONFIG_KEY) -> DiffusionFacts:
        """From JSON; ArtifactError for an unknown field, a missing ``mask_token`` or a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(raw, Mapping):
            raise ArtifactError(f"{where}: expected an object with {', '.join(known)}, got {type(raw).__name__}")
        for name in raw:
            if name not in known:
                raise ArtifactError(f"{where}: {unknown_name('field', str(name), known)}")
        if "mask_token" not in raw:
            raise ArtifactError(f"{where}: mask_token is missing: which token stands for an undecided position?")
        try:
            return cls(**raw)
        except OptionError as error:
            raise ArtifactError(f"{where}: {error}") from None


def facts_of(model: Any) -> DiffusionFacts | None:
    """What a model's config carries, checked against the model; None for a model that is no diffusion model."""
    raw = getattr(model.config, CONFIG_KEY, None)
    if raw is None:
        return None
    facts = DiffusionFacts.parse(raw)
    facts.check(model.config)
    return facts


def set_facts(model: Any, facts: DiffusionFacts) -> None:
    """Write them into the model's config, from where ``save_pretrained`` takes them to ``config.json``."""
    facts.check(model.config)
    setattr(model.config, CONFIG_KEY, facts.as_dict())


@dataclass(frozen=True)
class Published:
    """A checkpoint of others: the fields of its ``config.json`` by which it is recognised, and its facts."""

    name: str
    evidence: Mapping[str, object]
    facts: DiffusionFacts


# a distilled checkpoint has the config of the model it was distilled from
KNOWN = (
    Published(
        # token ids: the config and generate.py of ML-GSAI/LLaDA; 126348 ends a turn; the threshold is dParallel's
        "LLaDA-8B, LLaDA-1.5, dParallel-LLaDA",
        {
            "model_type": "llada",
            "architectures": ["LLaDAModelLM"],
            "vocab_size": 126464,
            "embedding_size": 126464,
            "mask_token_id": 126336,
        },
        DiffusionFacts(mask_token=126336, threshold=0.5, stop_tokens=(126081, 126348), pad_token=126081),
    ),
    Published(
        # the config names no mask token; the README of ML-GSAI/LLaDA does, and the tokenizer calls token 5 <[MASK]>
        "iLLaDA-8B",
        {
            "model_type": "illada",
            "architectures": ["ILLaDAForCausalLM"],
            "vocab_size": 155136,
            "mask_token_id": None,
        },
        DiffusionFacts(mask_token=5, threshold=0.5, stop_tokens=(2,), pad_token=1),
    ),
    Published(
        # Dream-Coder and DiffuCoder share all of it; 151645 ends a turn; the threshold is dParallel's
        "Dream-7B, dParallel-Dream",
        {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "vocab_size": 152064,
            "mask_token_id": 151666,
        },
        DiffusionFacts(
            mask_token=151666,
            shift=True,
            threshold=0.45,
            strict=True,
            stop_tokens=(151643, 151645),
            pad_token=151643,
        ),
    ),
)


def facts_for(config: Mapping[str, Any], where: str) -> DiffusionFacts:
    """Of a published checkpoint, from its ``config.json``: what stands in it, else what the table knows.

    ModelError for a checkpoint that neither names; ``where`` opens the message.
    """
    if CONFIG_KEY in config:
        facts = DiffusionFacts.parse(config[CONFIG_KEY], f"{where}: {CONFIG_KEY}")
        stated = config.get("mask_token_id")
        if stated is not None and stated != facts.mask_token:
            raise ModelError(
                f"{where}: {CONFIG_KEY} has mask_token {facts.mask_token}, mask_token_id is {stated}: correct the one "
                "that is wrong"
            )
        return facts
    for published in KNOWN:
        if all(config.get(field) == value for field, value in published.evidence.items()):
            return published.facts
    shown = {field: config.get(field) for field in ("model_type", "architectures", "vocab_size", "mask_token_id")}
    raise ModelError(
        f"{where} is none of {'; '.join(each.name for each in KNOWN)} ({shown}): say what it is with "
        f'"{CONFIG_KEY}": {{"mask_token": …, "shift": …, "stop_tokens": […]}} in its config.json'
    )
