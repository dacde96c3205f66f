"""From what a person types to an artifact's folder, and what there is to choose from. Opens no artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel.artifacts.manifest import MANIFEST_NAME
from accel.errors import ArtifactError

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")
_MOST_NAMED = 20


@dataclass(frozen=True)
class Found:
    """An artifact's id and where it lies."""

    id: str
    path: Path


def cache_folder() -> Path:
    """The user's cache: ACCEL_CACHE, else XDG_CACHE_HOME/accel, else ~/.cache/accel. May not exist yet."""
    if own := os.environ.get("ACCEL_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification says that a relative value is to be ignored
    base = Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache"
    return base / "accel"


def compiled_folder() -> Path:
    """Where kernels that were compiled for this machine's processor are kept."""
    return cache_folder() / "compiled"


def default_roots() -> list[Path]:
    """Where ids are looked for, in order: ACCEL_ARTIFACTS, the user's cache, what ships with accel."""
    listed = os.environ.get("ACCEL_ARTIFACTS", "").split(os.pathsep)
    own = [Path(part).expanduser().absolute() for part in listed if part]
    return [*own, cache_folder() / "artifacts", Path(__file__).parent.parent / "zoo"]


def resolve(name_or_path: str | Path, roots: Sequence[str | Path] | None = None) -> Path:
    """The folder of an artifact: an existing folder as it is, else an id found under one of the roots."""
    given = os.fspath(name_or_path)
    folder = Path(given).expanduser() if given else Path(os.devnull)
    if (folder / MANIFEST_NAME).is_file():
        return folder.absolute()
    if not _ID.fullmatch(given):
        if folder.is_dir():
            raise ArtifactError(f"{given} is not an artifact: it has no {MANIFEST_NAME}")
        raise ArtifactError(
            f"no artifact {given!r}: not an existing folder, and not an id (lower-case letters, digits, '.', '_', '-', "
            "at most one '/')"
        )
    for root in _folders(roots):
        candidate = root / given
        if (candidate / MANIFEST_NAME).is_file():
            if not _inside(candidate, root):
                raise ArtifactError(f"artifact {given!r}: {candidate} is a link that leaves {root}")
            return candidate.resolve()
    raise ArtifactError(_not_found(given, folder.is_dir(), roots))


def find_artifact(name_or_path: str | Path) -> Path | None:
    """The same, or None where there is no such artifact; nothing is opened."""
    try:
        return resolve(name_or_path)
    except ArtifactError:
        return None


def list_artifacts(roots: Sequence[str | Path] | None = None) -> list[Found]:
    """Every id that `resolve` would find, sorted; of two with one id, the earlier root's."""
    found: dict[str, Found] = {}
    for root in _folders(roots):
        for path in _candidates(root):
            name = path.relative_to(root).as_posix()
            if _ID.fullmatch(name) and (path / MANIFEST_NAME).is_file() and _inside(path, root):
                found.setdefault(name, Found(name, path.resolve()))
    return [found[name] for name in sorted(found)]


def _folders(roots: Sequence[str | Path] | None) -> list[Path]:
    return default_roots() if roots is None else [Path(root).absolute() for root in roots]


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _candidates(root: Path) -> Iterator[Path]:
    """The folders one and two levels down; an artifact's own sub-folders are not artifacts."""
    for first in _sub_folders(root):
        yield first
        if not (first / MANIFEST_NAME).is_file():
            yield from _sub_folders(first)


def _sub_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # absent or unreadable: there is nothing to list
        return []


def _not_found(given: str, is_folder: bool, roots: Sequence[str | Path] | None) -> str:
    ids = [found.id for found in list_artifacts(roots)]
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    have = f"there are {', '.join(ids[:_MOST_NAMED])}{more}" if ids else "there are none"
    note = f" (the folder {given} has no {MANIFEST_NAME})" if is_folder else ""
    places = ", ".join(map(str, _folders(roots)))
    return f"no artifact {given!r}{note}: {have} in {places}; give one of these or a folder with {MANIFEST_NAME}"
