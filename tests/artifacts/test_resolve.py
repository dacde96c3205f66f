"""A name becomes a folder inside a root, or a sentence that says what there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accel.artifacts import Artifact, cache_folder, default_roots, find_artifact, list_artifacts, resolve
from accel.errors import ArtifactError


def put(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "accel.json").write_text("{}")
    return folder


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    put(first, "alpha")
    put(first, "maker/beta-1.0")
    put(second, "alpha")
    put(second, "gamma")
    return [first, second, tmp_path / "absent"]


def test_folder_as_given(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(artifact.path, []) == artifact.path
    monkeypatch.chdir(artifact.path.parent)
    assert resolve("saved", []) == artifact.path
    assert resolve("./saved", []) == artifact.path


def test_ids_in_order_of_the_roots(roots: list[Path]) -> None:
    assert resolve("alpha", roots) == roots[0] / "alpha"
    assert resolve("alpha", roots[::-1]) == roots[1] / "alpha"
    assert resolve("maker/beta-1.0", roots) == roots[0] / "maker/beta-1.0"
    assert resolve("gamma", roots) == roots[1] / "gamma"


def test_nothing_found_is_none(roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_ARTIFACTS", str(roots[1]))
    assert find_artifact("gamma") == find_artifact(roots[1] / "gamma") == roots[1] / "gamma"
    assert find_artifact("delta") is find_artifact(roots[1]) is find_artifact("no id!") is None


def test_list(roots: list[Path]) -> None:
    put(roots[0], "Upper")  # not an id
    put(roots[0], "a/b/c")  # too deep
    put(roots[0], "alpha/part")  # inside another artifact
    (roots[1] / "gamma2").mkdir()  # no manifest
    found = list_artifacts(roots)
    assert [(item.id, item.path) for item in found] == [
        ("alpha", roots[0] / "alpha"),
        ("gamma", roots[1] / "gamma"),
        ("maker/beta-1.0", roots[0] / "maker/beta-1.0"),
    ]


def test_not_found_lists_what_is_there(roots: list[Path]) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve("delta", roots)
    message = str(caught.value)
    assert "\n" not in message
    assert "'delta'" in message
    assert "alpha, gamma, maker/beta-1.0" in message
    assert str(roots[1]) in message
    with pytest.raises(ArtifactError, match="there are none"):
        resolve("delta", roots[2:])


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for i in range(25):
        put(tmp_path, f"a{i:02d}")
    with pytest.raises(ArtifactError, match=r"a19 and 5 more in"):
        resolve("zzz", [tmp_path])


@pytest.mark.parametrize(
    "name",
    ["", "../second/gamma", "maker/../../second/gamma", "a/b/c", "Alpha", "alpha\n", "/nope", "alpha/", "a b"],
)
def test_what_is_not_an_id(roots: list[Path], name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve(name, roots[:1])
    assert "not an id" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_may_not_leave_their_root(roots: list[Path]) -> None:
    (roots[0] / "leak").symlink_to(roots[1] / "gamma")
    (roots[0] / "same").symlink_to(roots[0] / "alpha")
    assert "leak" not in [item.id for item in list_artifacts(roots)]
    with pytest.raises(ArtifactError, match="leaves"):
        resolve("leak", roots)
    assert resolve("same", roots) == roots[0] / "alpha"


def test_a_folder_without_manifest_is_said(roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "gamma").mkdir(parents=True)
    (tmp_path / "work" / "Other").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert resolve("gamma", roots) == roots[1] / "gamma"
    with pytest.raises(ArtifactError, match=r"Other is not an artifact: it has no accel\.json"):
        resolve("Other", roots)
    with pytest.raises(ArtifactError, match=r"the folder gamma has no accel\.json"):
        resolve("gamma", [])


def test_roots_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_ARTIFACTS", f"{tmp_path / 'x'}{os.pathsep}{os.pathsep}{tmp_path / 'y'}")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    roots = default_roots()
    assert roots[:3] == [tmp_path / "x", tmp_path / "y", tmp_path / "cache" / "artifacts"]
    assert roots[3].parts[-2:] == ("accel", "zoo")
    put(tmp_path / "y", "mine")
    assert resolve("mine") == tmp_path / "y" / "mine"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "accel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "accel"
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
