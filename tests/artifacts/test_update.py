"""Updating an artifact: manifest and texts together or not at all, tensors not written again."""

from __future__ import annotations

import dataclasses
import os

import pytest

from accel.artifacts import Artifact, open_artifact, store, update, verify
from accel.errors import ArtifactError


def test_texts_and_manifest_change_and_nothing_else(artifact: Artifact) -> None:
    before = {name: os.stat(artifact.path / name).st_ino for name in artifact.manifest.files}
    changed = dataclasses.replace(artifact.manifest, measured={"acceptance": 0.25})
    updated = update(artifact, changed, {"config.json": '{"a": 1}\n'})
    assert updated == open_artifact(artifact.path) and all(check.ok for check in verify(updated))
    assert updated.manifest.measured == {"acceptance": 0.25}
    assert updated.file("config.json").read_text() == '{"a": 1}\n'
    for name in ("model.safetensors", "maps.safetensors"):
        assert updated.manifest.files[name] == artifact.manifest.files[name]
        assert os.stat(artifact.path / name).st_ino == before[name]
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]


def test_without_hard_links_files_are_copied(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(store.os, "link", refuse)
    updated = update(artifact, artifact.manifest, {"config.json": "[]\n"})
    assert all(check.ok for check in verify(updated)) and updated.file("config.json").read_text() == "[]\n"


def test_a_failure_leaves_it_as_it_was(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(store, "_sync_folder", fail)
    with pytest.raises(ArtifactError, match="no space left"):
        update(artifact, artifact.manifest, {"config.json": "[]\n"})
    monkeypatch.undo()
    assert open_artifact(artifact.path) == artifact and all(check.ok for check in verify(artifact))
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["other.json", "model.safetensors", "../config.json"])
def test_only_texts_that_are_there_are_replaced(artifact: Artifact, name: str) -> None:
    with pytest.raises(ArtifactError, match="is none of them"):
        update(artifact, artifact.manifest, {name: "{}"})
    assert open_artifact(artifact.path) == artifact
