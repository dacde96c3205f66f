"""Writes an artifact's folder in one step, opens it, verifies it, and holds it against a model.

Knows files and digests; what the tensors mean is the business of the method that reads them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from accel.artifacts.checks import Check, content_check, leaves_folder, non_finite, structure_checks
from accel.artifacts.digest import config_digest, file_digest, tokenizer_digest, vocabulary_size
from accel.artifacts.manifest import FILE_SUFFIXES, MANIFEST_NAME, FileEntry, Manifest, check_file_name
from accel.errors import ArtifactError

_LARGEST_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest was read and whose files are all there. Contents are verified as they are read."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    def file(self, name: str) -> Path:
        """The path of one listed file, after its digest was checked."""
        entry = self.manifest.files.get(name)
        if entry is None:
            listed = ", ".join(sorted(self.manifest.files)) or "no files"
            raise ArtifactError(f"artifact {self.path} has no file {name!r}: it lists {listed}")
        path = self.path / name
        if leaves_folder(self.path, path):
            raise ArtifactError(f"{path}: is a link that leaves the artifact's folder")
        try:
            found = file_digest(path)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
        if found != entry.sha256:
            raise ArtifactError(f"{path}: sha256 is {found}, {MANIFEST_NAME} says {entry.sha256}: fetch it again")
        return path

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors of one safetensors file of the artifact, after its digest was checked."""
        path = self.file(name)
        try:
            return safetensors.torch.load_file(path, device=str(device))
        except SafetensorError as error:
            raise ArtifactError(f"{path}: is not a readable safetensors file: {error}") from error


def save(
    folder: str | Path,
    manifest: Manifest,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write an artifact that appears whole or not at all.

    ``tensors`` maps a file name ("model.safetensors") to its named tensors, ``texts`` a file name ("config.json") to
    its content; ``manifest`` comes without ``files``, which are listed here.
    """
    target = Path(os.path.abspath(folder))
    texts = texts or {}
    _check_content(manifest, tensors, texts)
    if target.exists() and not overwrite:
        raise ArtifactError(f"{target} exists already: choose another folder or pass overwrite=True")

    def fill(work: Path) -> dict[str, FileEntry]:
        files = {name: _write(work, name, _serialise(content)) for name, content in tensors.items()}
        return files | {name: _write(work, name, text.encode()) for name, text in texts.items()}

    return _make(target, manifest, fill)


def saved_files(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """What transformers saved in ``folder``, model and tokenizer, as `save` takes it: tensors and texts by file."""
    tensors: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if name.endswith(".safetensors"):
            tensors[name] = safetensors.torch.load_file(path)
        elif name.endswith(FILE_SUFFIXES):
            texts[name] = path.read_text(encoding="utf-8")
        elif not (folder / "tokenizer.json").is_file():
            raise ArtifactError(f"the tokenizer needs {name}, which an artifact may not hold: use its fast version")
    return tensors, texts


def update(artifact: Artifact, manifest: Manifest, texts: Mapping[str, str]) -> Artifact:
    """Give an artifact another manifest and other text files of the same names; the rest stays as it is, unread.

    Manifest and texts change together or not at all, and large files are not written again where the file system has
    hard links.
    """
    for name in texts:
        if name not in artifact.manifest.files or name.endswith(".safetensors"):
            raise ArtifactError(f"update() replaces text files that the artifact has: {name!r} is none of them")

    def fill(work: Path) -> dict[str, FileEntry]:
        for name in artifact.manifest.files:
            if name not in texts:
                _link(artifact.path / name, work / name)
        return {**artifact.manifest.files, **{name: _write(work, name, text.encode()) for name, text in texts.items()}}

    return _make(artifact.path, manifest, fill)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder, checked for form; the files it lists are not looked at."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: an artifact is a folder with {MANIFEST_NAME}")
    if not path.is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST_NAME}")
    if leaves_folder(folder, path):
        raise ArtifactError(f"{path}: is a link that leaves the artifact's folder")
    try:
        if (size := path.stat().st_size) > _LARGEST_MANIFEST:
            raise ArtifactError(f"{path}: has {size} bytes, a manifest may have {_LARGEST_MANIFEST}")
        return Manifest.from_json(path.read_bytes(), where=str(path))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_artifact(path: str | Path) -> Artifact:
    """Read the manifest and hold the folder against it (names, sizes, links, strays); reads no tensor yet."""
    folder = Path(os.path.abspath(path))
    manifest = read_manifest(folder)
    for check in structure_checks(folder, manifest):
        if not check.ok:
            raise ArtifactError(f"artifact {folder}: {check.name} {check.detail}")
    return Artifact(folder, manifest)


def verify(artifact: Artifact | str | Path, deep: bool = True) -> list[Check]:
    """Look at everything and report it; ``deep`` also reads every file: digests, and NaN or infinity in tensors."""
    folder = artifact.path if isinstance(artifact, Artifact) else Path(os.path.abspath(artifact))
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return [Check(MANIFEST_NAME, False, str(error))]
    checks = [Check(MANIFEST_NAME, True, f"{manifest.kind}, format {manifest.format_version}")]
    for check in structure_checks(folder, manifest):
        if deep and check.ok:
            check = content_check(folder, check.name, manifest.files[check.name])
        checks.append(check)
    return checks


def check_base(artifact: Artifact, model_config: Any, tokenizer: Any = None) -> None:
    """Refuse an artifact that was made for another model than the one with this config (and tokenizer)."""
    base = artifact.manifest.base
    pairs = [
        ("vocabulary size", base.vocab_size, vocabulary_size(model_config)),
        ("config digest", base.config_digest, config_digest(model_config)),
    ]
    if tokenizer is not None and base.tokenizer_digest is not None:
        pairs.append(("tokenizer digest", base.tokenizer_digest, tokenizer_digest(tokenizer)))
    for what, wanted, found in pairs:
        if wanted != found:
            raise ArtifactError(
                f"artifact {artifact.path} was made for {base.name} with {what} {wanted}, this model has {found}: "
                f"use it with {base.name}, or an artifact made for this model"
            )


def _check_content(manifest: Manifest, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    if manifest.files:
        raise ArtifactError("save() lists the files itself: pass a manifest without files")
    for name in (*tensors, *texts):
        if (problem := check_file_name(name)) is not None:
            raise ArtifactError(f"file {name!r} {problem}")
        if name.endswith(".safetensors") != (name in tensors):
            raise ArtifactError(f"file {name!r}: tensors go to *.safetensors, texts to other names")
    for name, content in tensors.items():
        for key, tensor in content.items():
            if non_finite(tensor):
                raise ArtifactError(f"file {name!r}: tensor {key!r} holds NaN or infinity, which no artifact may")


def _serialise(content: Mapping[str, Tensor]) -> bytes:
    # a copy each: views of one storage and strided tensors are not accepted by the format
    plain = {k: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in content.items()}
    return safetensors.torch.save(plain)


def _write(folder: Path, name: str, data: bytes) -> FileEntry:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(sha256=file_digest(path), bytes=len(data))


def _make(target: Path, manifest: Manifest, fill: Callable[[Path], dict[str, FileEntry]]) -> Artifact:
    """Let ``fill`` write an artifact's files into a folder, list them, and move the whole into place at once."""
    # beside the target, so that the final rename stays within one file system
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        text = dataclasses.replace(manifest, files=fill(work)).to_json()
        Manifest.from_json(text)  # what we could not read back is not written
        _write(work, MANIFEST_NAME, text.encode())
        for parent, _, _ in os.walk(work):
            _sync_folder(Path(parent))
        _move_into_place(work, target)
    except OSError as error:
        raise ArtifactError(f"cannot write the artifact {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_artifact(target)


def _link(source: Path, place: Path) -> None:
    """One file under two names, or a copy where the file system has no such links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # a link of ours must be to the data, not to a link
    real = source.resolve()
    try:
        os.link(real, place)
    except OSError:
        shutil.copy2(real, place)


def _sync_folder(folder: Path) -> None:
    """Make names durable too, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(work: Path, target: Path) -> None:
    """Rename ``work`` to ``target``; an older folder steps aside first and comes back if that fails."""
    aside = work.with_name(work.name + ".old")
    replacing = target.exists()
    if replacing:
        target.rename(aside)
    try:
        work.rename(target)
    except OSError:
        if replacing:
            aside.rename(target)
        raise
    _sync_folder(target.parent)
    if replacing:
        shutil.rmtree(aside, ignore_errors=True)
