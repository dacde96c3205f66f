"""What ships with accel: whole, listed, small, and made by the recipe that stands beside it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from accel.artifacts import Found, list_artifacts, open_artifact, verify
from accel.cli.common import DEFAULT_DRAFT, DEFAULT_MODEL

ZOO = Path(__file__).parent.parent / "accel" / "zoo"
EMBEDDED = list_artifacts([ZOO])


def test_the_default_draft_is_there() -> None:
    assert DEFAULT_DRAFT in [found.id for found in EMBEDDED]


@pytest.mark.parametrize("found", EMBEDDED, ids=lambda found: found.id)
def test_an_embedded_artifact_is_whole_and_listed(found: Found) -> None:
    artifact = open_artifact(found.path)
    assert [check for check in verify(artifact) if not check.ok] == []
    listed = (ZOO / "README.md").read_text(encoding="utf-8")
    assert f"| `{found.id}` | {artifact.manifest.kind}" in listed
    assert (ZOO / "recipes" / found.id / "README.md").exists()


@pytest.mark.parametrize("found", EMBEDDED, ids=lambda found: found.id)
def test_its_recipe_is_the_command_that_made_it(found: Found) -> None:
    made = open_artifact(found.path).manifest.made
    script = (ZOO / "recipes" / found.id / "make.sh").read_text(encoding="utf-8")
    command = next(line for line in script.replace("\\\n", " ").splitlines() if line.startswith("accel "))
    assert shlex.split(command.replace('"$@"', "")) == shlex.split(made["command"])
    assert made["seed"] is not None and made["data_digest"]


def test_the_default_draft_is_small_and_for_the_default_model() -> None:
    manifest = open_artifact(ZOO / DEFAULT_DRAFT).manifest
    assert manifest.base.name == DEFAULT_MODEL
    assert manifest.measured["parameters"] < 8_000_000
    # held-out prompts: a draft that agrees less than this was not made as its recipe says
    assert manifest.measured["greedy"]["top1"] > 0.3 and manifest.measured["sampled"]["acceptance"] > 0.3


def test_its_prompts_are_none_of_the_benchmarks() -> None:
    prompts = (ZOO / "recipes" / DEFAULT_DRAFT / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    learned = {_words(row.get("question") or row["prompt"]) for row in map(json.loads, prompts)}
    asked = (ZOO.parent.parent / "bench" / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert not learned & {_words(turn) for row in map(json.loads, asked) for turn in row["turns"]}


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
