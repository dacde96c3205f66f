"""Demonstrations as an artifact, and the stores that are made of it."""

from __future__ import annotations

import json

import pytest
from cascade_fakes import WordEmbedder, demonstration

from accel.artifacts import BaseModel, open_artifact, verify
from accel.errors import ArtifactError, OptionError
from accel.methods.cascade.demos import FILE, Demos, store_of
from accel.methods.cascade.prompt import Layout
from accel.methods.cascade.store import Situation

TEACHER = BaseModel("big-model", None, None, None, 0)
DEMOS = Demos(
    (demonstration("find the red key"), demonstration("boil an egg", "fill pan", "heat pan")), TEACHER, "Act."
)


def test_an_artifact_keeps_all_of_it(tmp_path):
    layout = Layout(observation="You see:", place="user")
    made = Demos(DEMOS.demonstrations, TEACHER, "Act.", layout, {"seed": 3}, {"cost": 0.5})
    artifact = made.save(tmp_path / "demos")
    assert all(check.ok for check in verify(artifact))
    assert Demos.load(open_artifact(tmp_path / "demos")) == made
    assert artifact.manifest.parameters["steps"] == 3


def test_what_is_no_demonstration_is_refused(tmp_path):
    with pytest.raises(OptionError, match="no demonstrations"):
        Demos((), TEACHER)
    artifact = DEMOS.save(tmp_path / "demos")
    (tmp_path / "demos" / FILE).write_text((tmp_path / "demos" / FILE).read_text().replace("egg", "leg"))
    with pytest.raises(ArtifactError, match="sha256"):
        Demos.load(artifact)


def test_only_demonstrations_may_come_from_an_unknown_model(tmp_path):
    DEMOS.save(tmp_path / "demos")
    manifest = tmp_path / "demos" / "accel.json"
    raw = json.loads(manifest.read_text())
    assert raw["base"]["config_digest"] is None
    manifest.write_text(json.dumps(raw | {"kind": "draft"}))
    with pytest.raises(ArtifactError, match=r"base\.config_digest"):
        open_artifact(tmp_path / "demos")


def test_a_store_in_the_cache_is_embedded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    first = WordEmbedder()
    with store_of([DEMOS], first) as store:
        assert len(store) == 2 and first.asked
        (found,) = store.retrieve(Situation(goal="boil an egg"), 1)
        assert found.demonstration.goal == "boil an egg"
    again = WordEmbedder()
    with store_of([DEMOS, DEMOS], again, tmp_path / "own.db") as other, store_of([DEMOS], again) as store:
        # the cache had it all; the file of one's own is another store
        assert len(store) == len(other) == 2 and store.path != other.path
        asked = len(again.asked)
        store_of([DEMOS], again).close()
        assert len(again.asked) == asked
    different = WordEmbedder(digest="d1")
    with store_of([DEMOS], different) as store:
        assert different.asked
