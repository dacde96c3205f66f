"""Compares an artifact's folder with its manifest, file by file. Reports; never raises for what it finds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from accel.artifacts.digest import file_digest
from accel.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``detail`` says what was wrong, or what was found right."""

    name: str
    ok: bool
    detail: str


def structure_checks(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Cheap: every listed file is there, inside the folder, of its size; nothing else is."""
    for name, entry in sorted(manifest.files.items()):
        yield _check_listed(folder, name, entry)
    for name, problem in _strays(folder, manifest):
        yield Check(name, False, problem)


def content_check(folder: Path, name: str, entry: FileEntry) -> Check:
    """Reads the whole file: its digest, and for safetensors that every number in it is finite."""
    try:
        found = file_digest(folder / name)
        if found != entry.sha256:
            return Check(name, False, f"sha256 is {found}, {MANIFEST_NAME} says {entry.sha256}")
        problem = _tensor_problem(folder / name) if name.endswith(".safetensors") else None
    except OSError as error:
        return Check(name, False, f"cannot be read: {error.strerror or error}")
    return Check(name, problem is None, problem or f"{entry.bytes} bytes, sha256 {found[:16]}…")


def leaves_folder(folder: Path, path: Path) -> bool:
    """Whether ``path``, with links followed, lies outside ``folder``."""
    return not path.resolve().is_relative_to(folder.resolve())


def non_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and type holds NaN or infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    # the 8-bit float types have no isfinite of their own
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return not bool(torch.isfinite(wide).all())


def _check_listed(folder: Path, name: str, entry: FileEntry) -> Check:
    path = folder / name
    try:
        if leaves_folder(folder, path):
            return Check(name, False, "is a link that leaves the artifact's folder")
        info = path.stat()
    except FileNotFoundError:
        return Check(name, False, f"is listed in {MANIFEST_NAME} but absent")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        return Check(name, False, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if not stat.S_ISREG(info.st_mode):
        return Check(name, False, "is not a regular file")
    if info.st_size != entry.bytes:
        return Check(name, False, f"has {info.st_size} bytes, {MANIFEST_NAME} says {entry.bytes}")
    return Check(name, True, f"{entry.bytes} bytes")


def _strays(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink():
                yield path.relative_to(folder).as_posix(), "is a link to a folder, which an artifact may not hold"
        for name in sorted(files):
            relative = Path(parent, name).relative_to(folder).as_posix()
            if relative != MANIFEST_NAME and relative not in manifest.files:
                yield relative, f"is in the folder but not listed in {MANIFEST_NAME}"


def _tensor_problem(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                if non_finite(file.get_tensor(key)):
                    return f"tensor {key!r} holds NaN or infinity"
    except SafetensorError as error:
        return f"is not a readable safetensors file: {error}"
    return None
