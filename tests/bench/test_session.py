"""A whole benchmark on a tiny model: plan in, document out, saved after every prompt, killed and resumed."""

from __future__ import annotations

import json

import pytest

import accel
from accel.bench import environment, saving, session
from accel.bench.runner import Settings
from accel.errors import OptionError


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [("1", "qa", ["a b a b a b"]), ("2", "rag", ["c d c d"]), ("3", "coding", ["e", "f"])]
    keys = ("question_id", "category", "turns")
    file.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows))
    return file


@pytest.fixture
def plan(prompt_file, tmp_path, fake_accel):
    def build(**fields):
        given = {
            "model": "tiny",
            "suite": "spec-bench",
            "prompt_file": prompt_file,
            "settings": Settings(max_new_tokens=4),
            "device": "cpu",
        }
        return session.Plan(**{**given, **fields})

    return build


def test_all_arms_on_a_tiny_model(plan, fake_accel):
    document = session.carry_out(plan())
    assert list(document["arms"]) == [
        *("transformers", "transformers-assisted", "accel-plain", "accel-ngram", "accel-suffix", "accel-auto")
    ]
    assert {arm["gate"] for arm in document["arms"].values()} == {"yes"}
    assert {arm["completed"] for arm in document["arms"].values()} == {3}
    assert list(document["groups"]) == ["qa", "rag", "multi-turn"]
    assert document["complete"] is True
    assert "records" not in document
    assert document["settings"]["dtype"] == "float32"
    # every attach is undone before the next
    assert [call[0] for call in fake_accel] == ["attach", "detach"] * 12
    json.dumps(document, allow_nan=False)


def test_the_seed_reaches_attach_only_when_sampling(plan, fake_accel):
    session.carry_out(plan(arms="transformers,accel-plain", settings=Settings(2, temperature=1.0, seed=7)))
    assert fake_accel[0] == ("attach", (), {"method": "plain", "seed": 7})


def test_progress_counts_every_run(plan):
    seen = []
    session.carry_out(
        plan(arms="transformers,accel-plain", settings=Settings(2, repeat=2, turns=2)),
        lambda done, total, prompt, arm: seen.append((done, total)),
    )
    # two prompts with one turn and one with two, two repetitions, two arms
    assert seen == [(i, 16) for i in range(16)]


def test_a_killed_run_keeps_what_it_measured_and_resumes(plan, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    fields = {"arms": "transformers,accel-plain", "output": output}

    def killed(done, total, prompt, arm):
        if prompt.id == "3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.carry_out(plan(**fields), killed)
    partial = saving.load(output)
    assert partial["complete"] is False
    assert [record["prompt"] for record in partial["records"]] == ["1", "1", "2", "2"]
    assert partial["arms"]["accel-plain"]["completed"] == 2

    asked = []
    document = session.carry_out(plan(**fields, resume=True), lambda done, total, p, arm: asked.append((p.id, total)))
    # the third prompt starts the rotation where the first run would have
    assert asked == [("3", 2), ("3", 2)]
    assert document["complete"] is True
    assert document["arms"]["accel-plain"]["completed"] == 3
    assert saving.load(output)["complete"] is True
    with pytest.raises(OptionError, match="is complete"):
        session.carry_out(plan(**fields, resume=True))


def test_resume_with_other_settings_is_refused(plan, tmp_path):
    output = tmp_path / "out.json"

    def killed(done, total, prompt, arm):
        if prompt.id == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.carry_out(plan(arms="transformers,accel-plain", output=output), killed)
    before = output.read_text()
    for fields, changed in [
        ({"arms": "transformers"}, "arms was"),
        ({"arms": "transformers,accel-plain", "settings": Settings(5)}, "max_new_tokens was 4 and is 5"),
        ({"arms": "transformers,accel-plain", "limit": 1, "model": "other"}, "model was 'tiny'"),
    ]:
        with pytest.raises(OptionError, match=changed):
            session.carry_out(plan(output=output, resume=True, **fields))
    assert output.read_text() == before


def test_resume_without_a_file_starts_from_nothing(plan, tmp_path):
    document = session.carry_out(plan(arms="transformers", output=tmp_path / "new.json", resume=True))
    assert document["arms"]["transformers"]["completed"] == 3


def test_a_broken_arm_stays_broken_after_a_resume(plan, tmp_path, monkeypatch):
    output = tmp_path / "out.json"

    def broken(model, *artifacts, **options):
        raise RuntimeError("cannot attach")

    monkeypatch.setattr(accel, "attach", broken)

    def killed(done, total, prompt, arm):
        if prompt.id == "2":
            raise KeyboardInterrupt

    fields = {"arms": "transformers,accel-plain", "output": output}
    with pytest.raises(KeyboardInterrupt):
        session.carry_out(plan(**fields), killed)
    document = session.carry_out(plan(**fields, resume=True))
    arm = document["arms"]["accel-plain"]
    assert (arm["gate"], arm["completed"], arm["failed"]) == ("FAILED", 0, 1)
    assert arm["failures"] == ["prompt 1: RuntimeError: cannot attach"]


def test_save_detailed_keeps_tokens_and_times(plan):
    document = session.carry_out(plan(arms="transformers", save_detailed=True))
    record = document["records"][0]
    assert len(record["tokens"]) == len(record["times"]) == 4


def test_a_draft_that_transformers_cannot_use_is_noted(plan, monkeypatch):
    loaded = accel.load("tiny")

    def load(name, **options):
        if name == "draft":
            raise OptionError("no such model")
        return loaded

    monkeypatch.setattr(accel, "load", load)
    document = session.carry_out(plan(artifacts=("draft",), arms="transformers,accel-lm"))
    assert document["notes"] == [
        "draft is not a transformers model (no such model), so transformers-assisted uses prompt lookup"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resume": True}, "--output"),
        ({"threads": 0}, "threads=0"),
        ({"artifacts": ("a", "b")}, "2 artifacts"),
        ({"arms": "accel-fast"}, "unknown arm 'accel-fast'"),
        ({"arms": "accel-lm"}, "with -a"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan, fields, message):
    with pytest.raises(OptionError, match=message):
        plan(**fields)


def test_environment_names_versions_and_machine():
    found = environment.describe()
    assert found["torch"]
    assert found["transformers"]
    assert found["threads"] >= 1
    assert found["cpu"]
    assert environment.package_version("no-such-distribution-here") is None
