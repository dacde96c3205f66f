"""The manifest's text: it survives a round trip, and everything that is not exactly right is one line of refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from accel.artifacts import FORMAT_VERSION, FileEntry, Manifest
from accel.errors import ArtifactError


@pytest.fixture
def raw(manifest: Manifest) -> dict[str, Any]:
    complete = dataclasses.replace(manifest, files={"a/b.safetensors": FileEntry("0" * 64, 3)})
    return json.loads(complete.to_json())


def refusal(raw: Any) -> str:
    text = raw if isinstance(raw, str) else json.dumps(raw)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text, where="x/accel.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("x/accel.json: ")
    return message


def test_round_trip_is_stable(raw: dict[str, Any]) -> None:
    manifest = Manifest.from_json(json.dumps(raw))
    assert manifest.files == {"a/b.safetensors": FileEntry("0" * 64, 3)}
    assert json.loads(manifest.to_json()) == raw
    shuffled = json.dumps(dict(reversed(raw.items())))
    assert Manifest.from_json(shuffled).to_json() == manifest.to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "weights"),
        ("kind", ["draft"]),
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 0),
        ("base", []),
        ("base.name", ""),
        ("base.name", None),
        ("base.revision", 3),
        ("base.config_digest", "0" * 63),
        ("base.config_digest", "G" * 64),
        ("base.tokenizer_digest", ""),
        ("base.vocab_size", -1),
        ("base.vocab_size", 32.0),
        ("base.vocab_size", True),
        ("parameters", []),
        ("measured", None),
        ("made.seed", "7"),
        ("made.command", 5),
        ("made.data_digest", "x"),
        ("made.losses", [1.0, "2"]),
        ("files", []),
    ],
)
def test_wrong_types_name_their_path_and_value(raw: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    holder = raw
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    message = refusal(raw)
    assert f" {path}: " in message
    assert repr(value)[:60] in message


@pytest.mark.parametrize("field", ["bytes", "sha256"])
def test_wrong_file_entries_name_the_file(raw: dict[str, Any], field: str) -> None:
    raw["files"]["a/b.safetensors"][field] = "12"
    assert f"files[a/b.safetensors].{field}" in refusal(raw)


def test_missing_and_unknown_fields_at_every_depth(raw: dict[str, Any]) -> None:
    holders = {"": raw, "base.": raw["base"], "files[a/b.safetensors].": raw["files"]["a/b.safetensors"]}
    for prefix, holder in holders.items():
        for field in list(holder):
            if field == "format_version":
                continue
            kept = copy.copy(holder)
            del holder[field]
            assert f" {prefix}{field}: missing" in refusal(raw)
            holder.update(kept)
        holder["surprise"] = 1
        assert f" {prefix}surprise: unknown field" in refusal(raw)
        del holder["surprise"]
    del raw["format_version"]
    assert "format_version: expected an integer, got None" in refusal(raw)


def test_newer_format_is_refused_with_both_versions_before_anything_else(raw: dict[str, Any]) -> None:
    message = refusal({**raw, "format_version": FORMAT_VERSION + 41, "new_field": 1})
    assert str(FORMAT_VERSION + 41) in message
    assert f"up to {FORMAT_VERSION}" in message


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.json",
        "../up.json",
        "a/../../up.json",
        "./a.json",
        "a//b.json",
        "a/",
        "",
        "..",
        "a\\b.json",
        "C:a.json",
        "a\n.json",
        "a.json\n",
        ".hidden.json",
        "accel.json",
        "weights.bin",
        "weights.pt",
        "weights.pkl",
        "code.py",
        "safetensors",
    ],
)
def test_unsafe_file_names(raw: dict[str, Any], name: str) -> None:
    raw["files"] = {name: {"sha256": "0" * 64, "bytes": 1}}
    assert f"files: {name!r}" in refusal(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"kind": NaN}',
        "[]",
        "null",
        '{"format_version": ' + "9" * 5000 + "}",
        "\x00",
    ],
)
def test_broken_json(text: str) -> None:
    assert len(refusal(text)) < 300


def test_a_repeated_field_is_refused_at_every_depth(raw: dict[str, Any]) -> None:
    text = json.dumps(raw)
    assert "'kind' appears twice" in refusal(text[:-1] + ', "kind": "draft"}')
    assert "'seed' appears twice" in refusal(text.replace('"seed": 7', '"seed": 7, "seed": 8'))


def test_bytes_that_are_not_utf8() -> None:
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Manifest.from_json(b"\xff\xfe\xfa")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_values_that_json_cannot_hold_are_not_written(manifest: Manifest, value: Any) -> None:
    with pytest.raises(ArtifactError):
        dataclasses.replace(manifest, measured={"x": value}).to_json()
