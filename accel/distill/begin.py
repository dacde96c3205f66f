"""What the run of every recipe begins with: outputs that are not there yet, a plan, and whom it is made for.

Knows folders, sizes and a model's name. Does not know what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from accel.artifacts import BaseModel, describe_base
from accel.errors import ArtifactError


class Planned(Protocol):
    """What is asked of a recipe's plan: the bytes that will be on disk, at most."""

    @property
    def total_bytes(self) -> int: ...


Plan = TypeVar("Plan", bound=Planned)


def begin_run(
    outputs: Sequence[Path],
    model: PreTrainedModel,
    tokenizer: Any,
    name: str | None,
    prepare: Callable[[], Plan],
    progress: Callable[[str], None],
) -> tuple[Plan, BaseModel]:
    """What ``prepare`` planned, and the manifest's entry for ``model`` under ``name``; None is its own name.

    ArtifactError, before anything is prepared, for an output that is there already.
    """
    for output in outputs:
        if output.exists():
            raise ArtifactError(f"{output} exists already: choose another folder")
    prepared = prepare()
    progress(f"at most {prepared.total_bytes / 2**20:.0f} MiB on disk")
    return prepared, describe_base(model.config, tokenizer, name=name)
