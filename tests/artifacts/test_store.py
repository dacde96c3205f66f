"""Saving is all or nothing; opening and verifying find every way a folder can differ from its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig

from accel.artifacts import Artifact, Manifest, check_base, open_artifact, save, store, tokenizer_digest, verify
from accel.errors import ArtifactError

Tensors = dict[str, dict[str, torch.Tensor]]


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as someone who tampers would."""
    raw = json.loads((folder / "accel.json").read_text())
    data = (folder / name).read_bytes()
    raw["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "accel.json").write_text(json.dumps(raw))


def refusal(folder: Path) -> str:
    """Opening raises one line, and verifying reports the same instead of raising."""
    with pytest.raises(ArtifactError) as caught:
        open_artifact(folder)
    message = str(caught.value)
    assert "\n" not in message
    failed = [check for check in verify(folder, deep=False) if not check.ok]
    assert any(check.detail in message for check in failed)
    return message


def test_what_was_saved_is_what_is_read(artifact: Artifact, manifest: Manifest, tensors: Tensors) -> None:
    opened = open_artifact(artifact.path)
    assert opened == artifact
    assert dataclasses.replace(opened.manifest, files={}) == manifest
    assert sorted(opened.manifest.files) == ["config.json", "maps.safetensors", "model.safetensors"]
    for name, content in tensors.items():
        loaded = opened.tensors(name)
        assert loaded.keys() == content.keys()
        assert all(
            torch.equal(loaded[key], content[key]) and loaded[key].dtype == content[key].dtype for key in content
        )
    assert opened.file("config.json").read_text() == "{}\n"
    assert all(check.ok for check in verify(opened))
    assert len(verify(opened)) == 4
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]


def test_an_unlisted_name_is_refused_with_the_listed_ones(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"no file 'other\.safetensors'.*maps\.safetensors, model\.safetensors"):
        artifact.tensors("other.safetensors")


def test_absent_file(artifact: Artifact) -> None:
    (artifact.path / "maps.safetensors").unlink()
    assert "maps.safetensors is listed in accel.json but absent" in refusal(artifact.path)


@pytest.mark.parametrize("name", ["extra.safetensors", "sub/extra.json", ".hidden", "model.safetensors.pkl"])
def test_unlisted_file(artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    assert f"{name} is in the folder but not listed" in refusal(artifact.path)


def test_truncated_file_names_both_sizes(artifact: Artifact) -> None:
    path = artifact.path / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(artifact.path)
    assert f"has {size - 1} bytes" in message
    assert f"says {size}" in message


def test_changed_bytes_are_found_when_read_with_both_digests(artifact: Artifact) -> None:
    path = artifact.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = open_artifact(artifact.path)
    found, listed = hashlib.sha256(data).hexdigest(), artifact.manifest.files[path.name].sha256
    for read in (opened.file, opened.tensors):
        with pytest.raises(ArtifactError, match=f"{found}.*{listed}"):
            read("model.safetensors")
    assert opened.tensors("maps.safetensors")
    assert all(check.ok for check in verify(opened, deep=False))
    failed = [check for check in verify(opened) if not check.ok]
    assert [check.name for check in failed] == ["model.safetensors"]
    assert found in failed[0].detail
    assert listed in failed[0].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_neither_saved_nor_verified(
    artifact: Artifact, manifest: Manifest, dtype: torch.dtype, value: float
) -> None:
    bad = torch.tensor([0.0, value]).to(dtype)
    with pytest.raises(ArtifactError, match="'w' holds NaN or infinity"):
        save(artifact.path.parent / "bad", manifest, {"model.safetensors": {"w": bad}})
    assert not (artifact.path.parent / "bad").exists()
    safetensors.torch.save_file({"fine": torch.ones(1), "w": bad}, artifact.path / "model.safetensors")
    relist(artifact.path, "model.safetensors")
    failed = [check for check in verify(open_artifact(artifact.path)) if not check.ok]
    assert [check.detail for check in failed] == ["tensor 'w' holds NaN or infinity"]


def test_a_file_that_is_no_safetensors(artifact: Artifact) -> None:
    (artifact.path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    relist(artifact.path, "model.safetensors")
    opened = open_artifact(artifact.path)
    assert [check.name for check in verify(opened) if not check.ok] == ["model.safetensors"]
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        opened.tensors("model.safetensors")


def test_links_may_not_leave_the_folder(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.path / "model.safetensors"
    path.rename(tmp_path / "outside")
    path.symlink_to("../outside")
    assert "model.safetensors is a link that leaves the artifact's folder" in refusal(artifact.path)
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        artifact.tensors("model.safetensors")


def test_the_manifest_may_not_be_a_link_out(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "accel.json").rename(tmp_path / "outside.json")
    (artifact.path / "accel.json").symlink_to(tmp_path / "outside.json")
    assert "accel.json: is a link that leaves" in refusal(artifact.path)


def test_links_to_folders_and_loops(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "sub").symlink_to(tmp_path)
    assert "sub is a link to a folder" in refusal(artifact.path)
    (artifact.path / "sub").unlink()
    path = artifact.path / "config.json"
    path.unlink()
    path.symlink_to("config.json")
    refusal(artifact.path)


def test_a_pipe_is_not_waited_for(artifact: Artifact) -> None:
    path = artifact.path / "config.json"
    path.unlink()
    os.mkfifo(path)
    assert "config.json is not a regular file" in refusal(artifact.path)


def test_not_a_folder_or_no_manifest(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nothing")
    assert "has no accel.json" in refusal(tmp_path)


def test_corrupt_and_oversized_manifest(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifact.path / "accel.json"
    monkeypatch.setattr(store, "_LARGEST_MANIFEST", 10)
    assert "a manifest may have 10" in refusal(artifact.path)
    monkeypatch.undo()
    path.write_text(path.read_text()[:-20])
    assert "not valid JSON" in refusal(artifact.path)


def test_an_existing_folder_is_kept_unless_asked(artifact: Artifact, manifest: Manifest) -> None:
    new = {"model.safetensors": {"w": torch.zeros(1)}}
    with pytest.raises(ArtifactError, match="exists already"):
        save(artifact.path, manifest, new)
    assert open_artifact(artifact.path) == artifact
    assert list(save(artifact.path, manifest, new, overwrite=True).manifest.files) == ["model.safetensors"]
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]


def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    artifact: Artifact, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for folder, overwrite in ((artifact.path, True), (artifact.path.parent / "new", False)):
        with pytest.raises(ArtifactError, match="No space left"):
            save(folder, manifest, {"model.safetensors": {"w": torch.zeros(1)}}, overwrite=overwrite)
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]
    assert open_artifact(artifact.path) == artifact


def test_a_failed_rename_brings_the_old_folder_back(
    artifact: Artifact, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails_into_place(self: Path, target: Path) -> Path:
        if target == artifact.path and not self.name.endswith(".old"):
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(ArtifactError, match="Permission denied"):
        save(artifact.path, manifest, {"model.safetensors": {"w": torch.zeros(1)}}, overwrite=True)
    assert open_artifact(artifact.path) == artifact
    assert [path.name for path in artifact.path.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("tensors", "texts"),
    [
        ({"../up.safetensors": {}}, {}),
        ({"/abs.safetensors": {}}, {}),
        ({"model.json": {}}, {}),
        ({}, {"model.safetensors": "x"}),
        ({}, {"accel.json": "{}"}),
        ({}, {"run.py": "x"}),
    ],
)
def test_names_that_may_not_be_saved(
    tmp_path: Path, manifest: Manifest, tensors: Tensors, texts: dict[str, str]
) -> None:
    with pytest.raises(ArtifactError, match="file '"):
        save(tmp_path / "new", manifest, tensors, texts)
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ArtifactError, match="kind"):
        save(tmp_path / "new", dataclasses.replace(manifest, kind="weights"), {})
    with pytest.raises(ArtifactError, match=r"made\.seed"):
        save(tmp_path / "new", dataclasses.replace(manifest, made={"seed": "7"}), {})
    assert not list(tmp_path.iterdir())


class FakeTokenizer:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_check_base_accepts_the_right_model(artifact: Artifact, config: LlamaConfig) -> None:
    check_base(artifact, config)
    check_base(artifact, config, FakeTokenizer("a"))  # this artifact recorded no tokenizer


def test_check_base_names_both_values(artifact: Artifact, config: LlamaConfig) -> None:
    def refused(artifact: Artifact, config: LlamaConfig, tokenizer: object = None) -> str:
        with pytest.raises(ArtifactError) as caught:
            check_base(artifact, config, tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    other = LlamaConfig.from_dict({**config.to_dict(), "vocab_size": 33})
    assert "vocabulary size 32, this model has 33" in refused(artifact, other)
    deeper = LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": 2})
    assert artifact.manifest.base.config_digest in refused(artifact, deeper)
    assert store.config_digest(deeper) in refused(artifact, deeper)

    known = FakeTokenizer("a", "b")
    base = dataclasses.replace(artifact.manifest.base, tokenizer_digest=tokenizer_digest(known))
    bound = Artifact(artifact.path, dataclasses.replace(artifact.manifest, base=base))
    check_base(bound, config, known)
    message = refused(bound, config, FakeTokenizer("b", "a"))
    assert tokenizer_digest(known) in message
    assert tokenizer_digest(FakeTokenizer("b", "a")) in message
