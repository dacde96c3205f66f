"""The artifact of a LAWCAT conversion: convs, feature maps, gates and LoRA, a few MB on top of a base model.

Knows manifests and names. What the tensors compute is ``accel.models.linear``'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from accel.artifacts import Artifact, BaseModel, Manifest, check_base, describe_base, non_finite, save
from accel.errors import ArtifactError
from accel.models.linear import Conversion, LinearSpec, LowRank, check_weights, converted_copy

FILE = "lawcat.safetensors"


@dataclass(frozen=True, eq=False)
class Lawcat:
    """A named conversion for one base model. ``tensors``: ``layers.N.NAME``, see ``accel.models.linear``."""

    # of its artifacts
    kind: ClassVar[str] = "lawcat"

    name: str
    spec: LinearSpec
    tensors: Mapping[str, Tensor]
    base: BaseModel
    low_rank: LowRank | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        model: PreTrainedModel,
        tokenizer: Any = None,
        low_rank: LowRank | None = None,
    ) -> Lawcat:
        """A live one, for ``model``; what does not fit it is refused."""
        base = describe_base(model.config, tokenizer)
        made = cls(name, spec, dict(tensors), base, low_rank)
        made._check(model, name)
        return made

    @classmethod
    def load(cls, artifact: Artifact, model: PreTrainedModel, tokenizer: Any = None) -> Lawcat:
        """Read an artifact for ``model``; whatever does not fit it is refused with both values."""
        where, manifest = str(artifact.path), artifact.manifest
        if artifact.kind != cls.kind:
            raise ArtifactError(f"{where} is a {artifact.kind} artifact: a {cls.kind} one is wanted")
        spec, low_rank = _parameters(manifest.parameters, where)
        check_base(artifact, model.config, tokenizer)
        found = cls(
            artifact.path.name,
            spec,
            artifact.tensors(FILE),
            manifest.base,
            low_rank,
            dict(manifest.made),
            dict(manifest.measured),
        )
        found._check(model, where)
        return found

    def save(
        self,
        folder: str | Path,
        *,
        made: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Artifact:
        """Write the artifact; the tensors keep their types."""
        manifest = Manifest(
            kind=self.kind,
            base=self.base,
            parameters={
                "spec": self.spec.as_dict(),
                "lora": None if self.low_rank is None else dataclasses.asdict(self.low_rank),
            },
            made=dict(self.made if made is None else made),
            measured=dict(self.measured if measured is None else measured),
        )
        return save(folder, manifest, {FILE: self.tensors}, overwrite=overwrite)

    def conversion(self, model: PreTrainedModel) -> Conversion:
        """What puts it into ``model``, and takes it out again."""
        return Conversion(model, self.spec, self.tensors, self.low_rank, self.name)

    def student(self, model: PreTrainedModel) -> PreTrainedModel:
        """A converted model beside ``model``, on the same weights: a draft for it."""
        return converted_copy(model, self.spec, self.tensors, self.low_rank)

    def nbytes(self) -> int:
        """Bytes of its own tensors."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    def _check(self, model: PreTrainedModel, where: str) -> None:
        self.spec.check_fits(model.config, where)
        check_weights(self.tensors, self.spec, model.config, where, self.low_rank)
        for name, tensor in sorted(self.tensors.items()):
            if not tensor.is_floating_point() or non_finite(tensor):
                raise ArtifactError(f"{where}: {name} is {tensor.dtype}, or holds NaN or infinity: it is broken")


def _parameters(raw: Mapping[str, Any], where: str) -> tuple[LinearSpec, LowRank | None]:
    if set(raw) != {"spec", "lora"} or not isinstance(raw["spec"], dict):
        raise ArtifactError(f"{where}: parameters are {sorted(raw)}, they must be spec (an object) and lora")
    spec, lora = LinearSpec.parse(raw["spec"], where), raw["lora"]
    if lora is None:
        return spec, None
    if not isinstance(lora, dict) or set(lora) != {"rank", "alpha"}:
        raise ArtifactError(f"{where}: lora is {lora!r}: it must be null, or an object with rank and alpha")
    rank, alpha = lora["rank"], lora["alpha"]
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ArtifactError(f"{where}: lora has rank {rank!r} and alpha {alpha!r}: a whole number ≥ 1, and a number")
    return spec, LowRank(rank, float(alpha))
