"""A cartridge: keys and values that stand in for a document in front of a row, and the artifact they are kept in.

Knows tensors, geometry and manifests. Does not know how a cartridge is trained, nor who reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from accel.artifacts import (
    Artifact,
    BaseModel,
    Manifest,
    check_base,
    describe_base,
    non_finite,
    save,
    stable_settings,
)
from accel.errors import ArtifactError, IncompatibleError
from accel.models.row_cache import Segment

FILE = "cartridge.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEMPLATES = ("system", "text")
# a slot with this bias weighs exp(-1e4) = 0 in fp32: artifacts hold no infinity
HIDDEN = -1e4
# rotations that change with the length of the context: keys kept from one length are wrong at another
_MOVING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Geometry:
    """What keys and values must look like for a model to read them, and how it rotated the keys."""

    layers: int
    kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Geometry:
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        # None for a model without rotation
        rope = stable_settings(getattr(text, "rope_parameters", None) or {})
        return cls(text.num_hidden_layers, kv_heads, head_dim, rope)


@dataclass(frozen=True)
class Document:
    """What a cartridge stands in for: sha256 of the text (UTF-8), and its tokens with whatever the template adds."""

    sha256: str
    tokens: int


@dataclass(frozen=True)
class Parameters:
    """``parameters`` of a cartridge's manifest.

    ``tokens``: p, the slots of a layer. ``positions``: how far it moves what follows (p, or the length of the
    original context for caches that were thinned out). ``sink_tokens``: first slots that training left alone.
    ``method``: how it was made. ``template``: "system" where it stands for the chat's system message, "text" where
    it stands in front of plain text. ``trained_with``: digests of the documents whose cartridges were trained
    together with it. ``exact``: the keys and values are the document's own, all of them.
    """

    tokens: int
    positions: int
    sink_tokens: int
    geometry: Geometry
    dtype: str
    method: str
    template: str = "system"
    # what stands in front of the document in its message
    instruction: str = ""
    documents: tuple[Document, ...] = ()
    trained_with: tuple[str, ...] = ()
    has_bias: bool = False
    exact: bool = False

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> Parameters:
        """From a manifest; ArtifactError names what is wrong."""
        try:
            given = dict(raw)
            given["geometry"] = Geometry(**given["geometry"])
            given["documents"] = tuple(Document(**each) for each in given.get("documents", ()))
            given["trained_with"] = tuple(given.get("trained_with", ()))
            parameters = cls(**given)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{where}: parameters of no cartridge: {error}") from error
        parameters._check(where)
        return parameters

    def _check(self, where: str) -> None:
        for name, least in (("tokens", 1), ("positions", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ArtifactError(f"{where}: {name} is {value!r}, it must be a whole number ≥ {least}")
        for name, allowed in (("dtype", tuple(DTYPES)), ("template", TEMPLATES)):
            if getattr(self, name) not in allowed:
                raise ArtifactError(
                    f"{where}: {name} is {getattr(self, name)!r}, it must be one of {', '.join(allowed)}"
                )
        if self.sink_tokens > self.tokens:
            raise ArtifactError(f"{where}: sink_tokens is {self.sink_tokens}, more than the {self.tokens} tokens")


@dataclass(frozen=True, eq=False)
class Cartridge:
    """A named segment for one model. The same object may stand in front of any number of rows; it is held once."""

    # of its artifacts
    kind: ClassVar[str] = "cartridge"

    name: str
    segment: Segment
    parameters: Parameters
    base: BaseModel
    made: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.segment.num_tokens

    def nbytes(self) -> int:
        """Bytes of keys and values as they are held, for every row together."""
        return self.segment.nbytes()

    @classmethod
    def load(cls, artifact: Artifact, model: PreTrainedModel, tokenizer: Any = None) -> Cartridge:
        """Read an artifact for ``model``; whatever does not fit it is refused with both values.

        Tensors are brought to the model's device and dtype.
        """
        where = str(artifact.path)
        if artifact.kind != cls.kind:
            raise ArtifactError(f"{where} is a {artifact.kind} artifact: a cartridge is wanted")
        parameters = Parameters.parse(artifact.manifest.parameters, where)
        check_fits(parameters, model.config, where)
        check_base(artifact, model.config, tokenizer)
        tensors = artifact.tensors(FILE)
        _check_tensors(tensors, parameters, where)
        placed = {
            name: each.to(model.device, torch.float32 if name.endswith("bias") else model.dtype)
            for name, each in tensors.items()
        }
        manifest = artifact.manifest
        return cls(
            artifact.path.name,
            _segment(placed, parameters),
            parameters,
            manifest.base,
            dict(manifest.made),
            dict(manifest.measured),
        )

    @classmethod
    def of(
        cls, name: str, segment: Segment, model: PreTrainedModel, tokenizer: Any = None, **parameters: Any
    ) -> Cartridge:
        """A live cartridge of keys and values made for ``model``; ``parameters`` are those of ``Parameters``."""
        told = {
            "tokens": segment.num_tokens,
            "positions": segment.num_positions,
            "geometry": Geometry.of(model.config),
            "dtype": str(segment.keys[0].dtype).removeprefix("torch."),
            "has_bias": segment.bias is not None,
        }
        all_parameters = Parameters(**{"sink_tokens": 0} | parameters | told)
        all_parameters._check(name)
        check_fits(all_parameters, model.config, name)
        _check_tensors(_named(segment), all_parameters, name)
        base = describe_base(model.config, tokenizer)
        return cls(name, segment, all_parameters, base)

    def save(
        self,
        folder: str | Path,
        *,
        dtype: str | None = None,
        made: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Artifact:
        """Write the artifact; ``dtype`` rounds keys and values ("bfloat16" halves an fp32 cartridge)."""
        dtype = dtype or self.parameters.dtype
        if dtype not in DTYPES:
            raise ArtifactError(f"dtype={dtype!r}: a cartridge is saved as one of {', '.join(DTYPES)}")
        tensors = {
            name: each.clamp(min=HIDDEN) if name.endswith("bias") else each.to(DTYPES[dtype])
            for name, each in _named(self.segment).items()
        }
        manifest = Manifest(
            kind=self.kind,
            base=self.base,
            parameters=dataclasses.replace(self.parameters, dtype=dtype).as_dict(),
            made=dict(self.made if made is None else made),
            measured=dict(self.measured if measured is None else measured),
        )
        return save(folder, manifest, {FILE: tensors}, overwrite=overwrite)


def check_fits(parameters: Parameters, config: PreTrainedConfig, where: str) -> None:
    """Refuse a cartridge whose keys and values ``config``'s model cannot read as they are."""
    wanted = Geometry.of(config)
    for name in ("layers", "kv_heads", "head_dim"):
        has, needs = getattr(parameters.geometry, name), getattr(wanted, name)
        if has != needs:
            raise ArtifactError(f"{where}: the cartridge has {name} {has}, the model {needs}: use one made for it")
    has_rope, needs_rope = dict(parameters.geometry.rope), dict(wanted.rope)
    for key in sorted({*has_rope, *needs_rope}):
        if has_rope.get(key) != needs_rope.get(key):
            raise ArtifactError(
                f"{where}: the cartridge's keys were rotated with {key} {has_rope.get(key)}, the model has "
                f"{needs_rope.get(key)}: use one made for it"
            )
    if any(kind in str(needs_rope) for kind in _MOVING_ROPE):
        raise IncompatibleError(
            f"{where}: the model's rotation changes with the length of its context ({needs_rope}), so that no keys can "
            "be kept: cartridges need a model whose rotation is fixed"
        )
    text = config.get_text_config(decoder=True)
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ()) or getattr(text, "sliding_window", None)
    if windows and parameters.positions != parameters.tokens:
        raise IncompatibleError(
            f"{where}: {parameters.tokens} slots for {parameters.positions} positions, and the model's sliding windows "
            "must know the position of each: use a model without them"
        )


def check_together(cartridges: Sequence[Cartridge]) -> list[str]:
    """What the caller should know of cartridges that stand behind one another, one sentence each."""
    if len(cartridges) < 2:
        return []
    documents = [{each.sha256 for each in cartridge.parameters.documents} for cartridge in cartridges]
    everything = set().union(*documents)
    apart = [
        cartridge.name
        for cartridge, own in zip(cartridges, documents, strict=True)
        if not everything <= own | set(cartridge.parameters.trained_with)
    ]
    if not apart:
        return []
    return [
        f"{', '.join(apart)}: not trained to stand together with the others; answers from several such cartridges are "
        "measurably worse (accel bench --suite cartridge), see accel distill cartridge with several --corpus"
    ]


def _named(segment: Segment) -> dict[str, Tensor]:
    tensors = {}
    for layer, (keys, values) in enumerate(zip(segment.keys, segment.values, strict=True)):
        tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"] = keys, values
        if segment.bias is not None:
            tensors[f"layers.{layer}.bias"] = segment.bias[layer]
    return tensors


def _segment(tensors: Mapping[str, Tensor], parameters: Parameters) -> Segment:
    def column(kind: str) -> tuple[Tensor, ...]:
        return tuple(tensors[f"layers.{layer}.{kind}"] for layer in range(parameters.geometry.layers))

    bias = column("bias") if parameters.has_bias else None
    return Segment(column("keys"), column("values"), parameters.positions, bias)


def _check_tensors(tensors: Mapping[str, Tensor], parameters: Parameters, where: str) -> None:
    """Names, shapes, dtypes and finite numbers, as the parameters say."""
    geometry = parameters.geometry
    kinds = ("keys", "values", "bias") if parameters.has_bias else ("keys", "values")
    wanted = {f"layers.{layer}.{kind}" for layer in range(geometry.layers) for kind in kinds}
    if set(tensors) != wanted:
        missing, unknown = sorted(wanted - set(tensors))[:3], sorted(set(tensors) - wanted)[:3]
        raise ArtifactError(f"{where}: tensors missing {missing}, unknown {unknown}: it must hold {', '.join(kinds)}")
    for name, tensor in sorted(tensors.items()):
        is_bias = name.endswith("bias")
        slots = (geometry.kv_heads, parameters.tokens)
        shape = slots if is_bias else (*slots, geometry.head_dim)
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{where}: {name} is {list(tensor.shape)}, the parameters say {list(shape)}")
        dtype = torch.float32 if is_bias else DTYPES[parameters.dtype]
        if tensor.dtype != dtype:
            raise ArtifactError(f"{where}: {name} is {tensor.dtype}, the parameters say {dtype}")
        if non_finite(tensor.masked_fill(tensor == -math.inf, 0.0) if is_bias else tensor):
            raise ArtifactError(f"{where}: {name} holds NaN or infinity: the cartridge is broken")
