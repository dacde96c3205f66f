"""`accel artifact`: clean output, one line for each thing wrong, and an exit code that scripts can trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from accel.artifacts import BaseModel, Manifest, save
from accel.cli.artifact import artifact


def run(*arguments: str) -> Result:
    return CliRunner().invoke(artifact, arguments)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "root"
    manifest = Manifest(
        kind="draft",
        base=BaseModel("tiny-base", "r1", "a" * 64, None, 32),
        parameters={"d2t": None},
        measured={"acceptance": 0.5},
    )
    for name in ("one", "maker/two"):
        save(root / name, manifest, {"model.safetensors": {"w": torch.ones(3)}})
    monkeypatch.setenv("ACCEL_ARTIFACTS", str(root))
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return root


def test_list(root: Path) -> None:
    lines = run("list").stdout.splitlines()
    mine = [line for line in lines if str(root) in line]
    assert [line.split()[:4] for line in mine] == [
        ["maker/two", "draft", "for", "tiny-base"],
        ["one", "draft", "for", "tiny-base"],
    ]
    rows = {row["id"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows["one"]["path"] == str(root / "one")
    assert rows["one"]["bytes"] == (root / "one" / "model.safetensors").stat().st_size


def test_list_goes_on_past_a_broken_one(root: Path) -> None:
    (root / "one" / "accel.json").write_text("{")
    result = run("list")
    assert result.exit_code == 0
    assert "one  broken: " in result.stdout
    assert "maker/two  draft" in result.stdout
    rows = {row["id"]: row for row in json.loads(run("list", "--json").stdout)}
    assert "not valid JSON" in rows["one"]["error"]


def test_an_empty_list_is_clean_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.cli.artifact.list_artifacts", list)
    assert json.loads(run("list", "--json").stdout) == []
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "ACCEL_ARTIFACTS" in result.stderr


@pytest.mark.parametrize("by", ["id", "path"])
def test_inspect(root: Path, by: str) -> None:
    given = "one" if by == "id" else str(root / "one")
    text = run("inspect", given).stdout
    for part in ("draft artifact, format 1", "tiny-base at r1", "a" * 64, "acceptance: 0.5", "model.safetensors"):
        assert part in text
    document = json.loads(run("inspect", given, "--json").stdout)
    assert document["base"]["vocab_size"] == 32
    assert document["path"] == str(root / "one")


def test_verify_a_good_one(root: Path) -> None:
    result = run("verify", "one")
    assert (result.exit_code, result.stdout) == (0, f"{root / 'one'}: all 2 checks passed\n")
    document = json.loads(run("verify", "one", "--json").stdout)
    assert (document["ok"], [check["name"] for check in document["checks"]]) == (
        True,
        ["accel.json", "model.safetensors"],
    )


def test_verify_a_bad_one(root: Path) -> None:
    (root / "one" / "stray.txt").write_text("x")
    path = root / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run("verify", "one")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.safetensors", "stray.txt"]
    result = run("verify", "one", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert [check["ok"] for check in document["checks"]] == [True, False, False]
    assert document["ok"] is False


def test_verify_a_broken_manifest(root: Path) -> None:
    (root / "one" / "accel.json").write_text('{"format_version": 2}')
    result = run("verify", "one")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "the artifact has 2, this accel reads up to 1" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("given", ["nothing-here", "../one", "/", ""])
def test_not_found_is_one_line(root: Path, command: str, given: str) -> None:
    result = run(command, given, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
