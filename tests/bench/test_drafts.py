"""The suite `drafts` on a tiny model: from artifacts to the document, the tables, the plots; and hand-made figures."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import accel
from accel.artifacts import Manifest, describe_base, save
from accel.bench import candidates, drafts, drafts_report, gate, plot, saving
from accel.bench.measure import Record
from accel.bench.runner import Settings
from accel.errors import OptionError


@pytest.fixture
def artifact(tmp_path, model, tokenizer):
    """Make a draft artifact: a noised copy of the model; ``recipe`` says how it claims to be made."""

    def make(name, noise, **recipe):
        draft = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in draft.parameters():
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        held_out = {"acceptance": 0.6, "top1": 0.5, "block_efficiency": {"2": 1.75}}
        manifest = Manifest(
            kind="draft",
            base=describe_base(model.config, tokenizer, name="tiny"),
            parameters={"config": draft.config.to_diff_dict()},
            made={"recipe": {"loss": "lk", "data": "target", "baseline": False, "keep": 1.0, **recipe}},
            measured={"sampled": held_out, "greedy": held_out, "coverage": 1.0},
        )
        save(tmp_path / name, manifest, {"model.safetensors": draft.state_dict()})
        return str(tmp_path / name)

    return make


@pytest.fixture
def plan(artifact, model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(accel, "load", lambda name, **options: SimpleNamespace(model=model, tokenizer=tokenizer))
    sources = (artifact("good", 0.02), artifact("plain-lm", 0.3, baseline=True))
    file = tmp_path / "questions.jsonl"
    rows = [{"question": "How many?", "answer": "#### 4"}, {"question": "Which one?"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def build(**fields):
        given = {
            "model": "tiny",
            "artifacts": sources,
            "suite": "drafts",
            "prompt_file": file,
            "settings": Settings(12),
            "device": "cpu",
            "draft_lengths": (2,),
        }
        return drafts.DraftsPlan(**{**given, **fields})

    return build


def test_drafts_beside_each_other_and_beside_theory(plan):
    document = drafts.carry_out(plan())
    assert [(row["arm"], row["decoding"], row["gate"]) for row in document["rows"]] == [
        ("good", "greedy", "yes"),
        ("plain-lm", "greedy", "yes"),
        ("good", "temperature 1", "sampled"),
        ("plain-lm", "temperature 1", "sampled"),
    ]
    assert document["drafts"]["good"]["loss"] == "lk"
    assert document["drafts"]["plain-lm"]["loss"] == "next token"
    assert document["prompts"] == 2 and document["complete"] and "records" not in document
    for row in document["rows"]:
        assert row["speedup"] > 0 and row["predicted_speedup"] > 0 and row["draft_length"] == 2
        assert row["measured_over_predicted"] == pytest.approx(row["speedup"] / row["predicted_speedup"])
        assert (row["baseline"], row["speedup_vs_baseline"] is None) == (
            ("plain-lm", False) if row["arm"] == "good" else (None, True)
        )
        if row["decoding"] == "greedy":
            # the same texts: theory counts what the run counted
            assert row["first_acceptance"] == pytest.approx(row["theory"]["first_acceptance"])
            assert row["mean_accepted_length"] == pytest.approx(row["theory"]["mean_accepted_length"])
    json.dumps(document, allow_nan=False)
    text = drafts_report.terminal(document)
    assert "greedy and at temperature 1" in text and "1.75" in text
    page = drafts_report.page(document)
    assert page.count("<svg") == 2 and "next token" in page
    assert plot.page(drafts_report.charts(document)).startswith("<svg")
    assert not any("accel" in key for key in vars(accel.load("").model))  # nothing is left attached


def test_arms_draw_from_the_models_own_distribution_with_one_seed(plan, model, monkeypatch):
    """A generation config with top_k, top_p and a penalty changes nothing; plain and drafts share their first token."""
    for name, value in (("top_k", 1), ("top_p", 0.1), ("repetition_penalty", 5.0)):
        monkeypatch.setattr(model.generation_config, name, value)
    document = drafts.carry_out(plan(save_detailed=True))
    sampled = [record for record in document["records"] if record["temperature"] == 1]
    first = {record["prompt"]: set() for record in sampled}
    for record in sampled:
        first[record["prompt"]].add(record["tokens"][0])
    assert [len(tokens) for tokens in first.values()] == [1, 1]
    assert len({tuple(record["tokens"]) for record in sampled if record["arm"] == "accel-plain"}) == 2
    greedy = [record for record in document["records"] if record["temperature"] == 0]
    # top_k=1 would have made sampling greedy
    assert {tuple(r["tokens"]) for r in greedy}.isdisjoint({tuple(r["tokens"]) for r in sampled})


def test_several_draft_lengths_are_arms_of_their_own(plan):
    document = drafts.carry_out(plan(draft_lengths=(1, 3), settings=Settings(6)))
    assert [row["arm"] for row in document["rows"]][:4] == ["good γ=1", "good γ=3", "plain-lm γ=1", "plain-lm γ=3"]
    assert all(row["mean_draft_length"] <= row["draft_length"] for row in document["rows"])
    assert document["rows"][1]["speedup_vs_baseline"] is not None


def test_a_killed_run_resumes_in_both_decodings(plan, tmp_path):
    output = tmp_path / "out.json"

    def killed(done, total, prompt, arm):
        assert total == 12
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drafts.carry_out(plan(output=output), killed)
    partial = saving.load(output)
    assert [(record["prompt"], record["temperature"]) for record in partial["records"]] == [("1", 0)] * 3 + [
        ("1", 1)
    ] * 3
    assert partial["rows"][0]["theory"] is None and "UNFINISHED" in drafts_report.terminal(partial)
    asked = []
    document = drafts.carry_out(plan(output=output, resume=True), lambda done, total, p, arm: asked.append((p.id, arm)))
    assert [id for id, arm in asked if arm != "theory"] == ["2"] * 6
    assert document["complete"] and all(row["theory"] for row in document["rows"])
    with pytest.raises(OptionError, match="is complete"):
        drafts.carry_out(plan(output=output, resume=True))


def test_a_refused_output_gets_no_figure():
    """Of the arm itself, and of those that are compared with it."""
    stats = {
        "row_calls": 4,
        "drafted_tokens": 8,
        "accepted_tokens": 4,
        "cost_ratio": 0.25,
        "lossless": True,
        "notes": [],
        "drafted_by_position": [4, 4],
        "accepted_by_position": [3, 1],
    }

    def record(arm, seconds, verdict):
        tokens = list(range(9))
        return Record(
            "1", "qa", "qa", arm, tokens=tokens, seconds=seconds, stats=stats, verdict=verdict, times=[seconds]
        )

    facts = {"loss": "lk", "baseline": False, "shape": "1x8", "vocabulary": 9}
    entries = {
        "ours": (candidates.Candidate("ours", None, facts), 2),
        "base": (candidates.Candidate("base", None, facts | {"baseline": True}), 2),
    }
    frame = {"settings": {}, "environment": {}, "command": "", "date": "", "complete": True}

    def rows(verdict):
        records = [record("accel-plain", 3.0, gate.IDENTICAL), record("ours", 1.5, gate.IDENTICAL)]
        return drafts.document([*records, record("base", 2.0, verdict)], entries, {}, frame)["rows"]

    ours, base = rows(gate.IDENTICAL)[:2]
    assert ours["speedup"] == pytest.approx(2) and ours["speedup_vs_baseline"] == pytest.approx(4 / 3)
    # τ = 2, γ = 2, c = 0.25
    assert ours["predicted_speedup"] == pytest.approx(2 / 1.5)
    assert ours["first_acceptance"] == 0.75 and ours["measured_over_predicted"] == pytest.approx(1.5)
    assert base["speedup"] == pytest.approx(1.5) and base["baseline"] is None
    ours, base = rows(gate.FAILED)[:2]
    assert base["gate"] == "FAILED" and base["speedup"] is base["measured_over_predicted"] is None
    assert ours["speedup"] == pytest.approx(2) and ours["speedup_vs_baseline"] is None


def test_names_are_folders_unless_two_are_called_the_same():
    assert candidates.names_of(["a/lk", "b/tvd"]) == ["lk", "tvd"]
    assert candidates.names_of(["a/lk", "b/lk", "accel-plain/"]) == ["a/lk", "b/lk", "accel-plain/"]
    with pytest.raises(OptionError, match="given twice"):
        candidates.names_of(["a", "a"])


def test_a_loss_is_named_with_what_belongs_to_it(artifact, model):
    names = {
        "jsd 0.5": {"loss": "jsd", "beta": 0.5},
        "tvd, keep 0.4": {"loss": "tvd", "keep": 0.4},
        "next token": {"baseline": True},
    }
    for name, recipe in names.items():
        found = candidates.load(artifact(name.replace(" ", ""), 0.0, **recipe), name, model)
        assert found.facts["loss"] == name
        assert found.facts["shape"] == "2x32x2x1x64" and found.facts["vocabulary"] == 257


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"artifacts": ()}, "one or more with -a"),
        ({"draft_lengths": (0,)}, "draft_length=0"),
        ({"draft_lengths": (3, 3)}, "give each once"),
        ({"artifacts": ("a", "a")}, "given twice"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan, fields, message):
    with pytest.raises(OptionError, match=message):
        plan(**fields)
