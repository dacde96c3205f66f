"""What users hand over: artifacts by name or folder, opened once, and told apart by what they are.

Knows manifests. What an artifact does is the business of those who take it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from accel.artifacts import MANIFEST_NAME, Artifact, open_artifact, resolve


class Kept(Protocol):
    """What can be saved as an artifact, and read from one."""

    kind: ClassVar[str]


Live = TypeVar("Live", bound=Kept)


def opened(given: object) -> object:
    """The artifact that a name or a folder stands for; what is none of ours (a transformers folder too) as it is."""
    if not isinstance(given, str | Path):
        return given
    folder = Path(given)
    if (folder / "config.json").exists() and not (folder / MANIFEST_NAME).exists():
        return given
    return open_artifact(resolve(given))


def parted(given: Iterable[object], live: type[Live]) -> tuple[list[Live | Artifact], list[object]]:
    """Those that are ``live`` or artifacts of its kind, and the others; both in order. What has a name was opened."""
    found: list[Live | Artifact] = []
    others: list[object] = []
    for each in given:
        if isinstance(each, live) or (isinstance(each, Artifact) and each.kind == live.kind):
            found.append(each)
        else:
            others.append(each)
    return found, others
