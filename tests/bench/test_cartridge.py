"""The suite `cartridge` on a tiny model: every context measured, figures that follow from what was asked, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from accel.bench import cartridge as suite
from accel.bench.workloads import Prompt
from accel.cli.main import main
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.cartridge.evaluate import log_probabilities
from accel.methods.cartridge.template import query_ids

TEXT = "The ferry Marigold leaves at nine. The lamp was lit in 1903 by Ada Holm. " * 3
QUESTIONS = [
    {"question": "When does it leave?", "answer": "at nine"},
    {"question": "Who lit the lamp?", "answer": "Ada Holm"},
    {"question": "Which year?", "answer": "1903"},
]


FEW = ("--concurrency", "1,2", "--repeat", 1)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, tokenizer) -> dict[str, Path]:
    """A model folder, a document, questions, and two cartridges: the document's first part, and all of it."""
    where = tmp_path_factory.mktemp("cartridges")
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    (where / "document.txt").write_text(TEXT)
    (where / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    ids = tokenizer(TEXT)["input_ids"]
    about = {"template": "text", "documents": (document.describe(TEXT, len(ids)),)}
    for name, part in (("small", ids[:30]), ("all", ids)):
        live = Cartridge.of(name, document.read(model, part), model, tokenizer, method="whole", **about)
        live.save(where / name)
    return {name: where / name for name in ("model", "document.txt", "questions.jsonl", "small", "all")}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(suite, "TIMED", 1)


def test_every_context_is_measured(made, quick, tmp_path) -> None:
    output = tmp_path / "out.json"
    common = ["--corpus", made["document.txt"], "--prompts", made["questions.jsonl"], "--max-new-tokens", 4, *FEW]
    result = run(
        made["model"], "--suite", "cartridge", "-a", made["small"], "-a", made["all"], *common, "--output", output
    )
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    contexts = found["contexts"]
    assert list(contexts) == ["none", "full", "full, cached", "first 30 tokens", "small", "all"]
    assert found["parity"] < 1e-5 and found["settings"]["document_tokens"] == 219
    # the cartridge of everything keeps everything, the beginning is the beginning
    said = {name: row["log_probability"] for name, row in contexts.items()}
    assert said["all"] == pytest.approx(said["full, cached"], abs=1e-3) and said["full"] == said["full, cached"]
    assert said["small"] == pytest.approx(said["first 30 tokens"], abs=1e-3)
    assert contexts["small"]["kv_bytes"] * 219 == contexts["all"]["kv_bytes"] * 30
    # each request in the prompt holds a copy of its own, the cartridge is held once
    copies, shared = contexts["full"]["at_2"]["state_bytes"], contexts["all"]["at_2"]["state_bytes"]
    assert copies > 2 * contexts["all"]["kv_bytes"] and shared < 1.5 * contexts["all"]["kv_bytes"]
    assert "gain kept" in result.stdout and "first 30 tokens" in result.stdout


def test_documents_together_and_apart(made, model, tokenizer, quick, tmp_path) -> None:
    """Two documents: both in the prompt, their cartridges side by side, and each category told apart."""
    other = "The red engine pulls seven wagons. "
    (tmp_path / "other.txt").write_text(other)
    ids = tokenizer(other)["input_ids"]
    about = {"template": "text", "documents": (document.describe(other, len(ids)),)}
    Cartridge.of("b", document.read(model, ids), model, tokenizer, method="whole", **about).save(tmp_path / "b")
    asked = [each | {"category": "ferry"} for each in QUESTIONS]
    engine = {
        "question": "What does it pull?",
        "answer": "seven",
        "reply": "It pulls seven wagons.",
        "category": "engine",
    }
    asked.append(engine)
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    together = f"{made['all']}+{tmp_path / 'b'}"
    arguments = [made["model"], "--suite", "cartridge", "-a", made["all"], "-a", together, "--max-new-tokens", 4, *FEW]
    arguments += ["--corpus", made["document.txt"], "--prompts", tmp_path / "both.jsonl"]
    result = run(*arguments, "--corpus", tmp_path / "other.txt", "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    contexts = found["contexts"]
    beginnings = ["first 219 tokens", f"first {219 + len(ids)} tokens"]
    assert list(contexts) == ["none", "full", "full, cached", *beginnings, "all", "all+b"]
    both = tokenizer(TEXT + "\n\n" + other)["input_ids"]
    assert found["settings"]["document_tokens"] == len(both) and contexts["all+b"]["tokens"] == 219 + len(ids)
    for row in contexts.values():
        parts = row["categories"]
        assert {name: each["questions"] for name, each in parts.items()} == {"ferry": 3, "engine": 1}
        mean = (3 * parts["ferry"]["log_probability"] + parts["engine"]["log_probability"]) / 4
        assert mean == pytest.approx(row["log_probability"])
    # what stands together is read together
    apart = log_probabilities(
        model,
        [document.read(model, tokenizer(TEXT)["input_ids"]), document.read(model, ids)],
        [query_ids(tokenizer, [{"role": "user", "content": "What does it pull?"}], "text")],
        [tokenizer("It pulls seven wagons.", add_special_tokens=False)["input_ids"]],
    )
    assert contexts["all+b"]["categories"]["engine"]["log_probability"] == pytest.approx(apart[0], abs=1e-3)
    assert "2 documents" in result.stdout and "engine" in result.stdout
    # a cartridge of a document that is not in the prompt would be compared with less than it knows
    result = run(*arguments)
    assert result.exit_code != 0 and "was made of another document" in result.stderr


def test_a_limit_takes_questions_from_all_over_the_file() -> None:
    prompts = [Prompt(str(number), "question", ("?",), "x") for number in range(10)]
    assert [each.id for each in suite._spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert suite._spread(prompts, None) == suite._spread(prompts, 10) == prompts
    with pytest.raises(OptionError, match="limit=0"):
        suite._spread(prompts, 0)


def test_the_gain_is_told_as_a_share_of_the_whole_documents() -> None:
    rows = {
        name: {"log_probability": value} for name, value in (("none", -20.0), ("full, cached", -12.0), ("c", -14.0))
    }
    assert [suite._kept(rows, name) for name in ("none", "full, cached", "c")] == [0, 1, 0.75]
    rows["full, cached"]["log_probability"] = -21.0  # a document that only confuses has no gain to keep
    assert suite._kept(rows, "c") is None


def test_log_probabilities_are_the_models_own(tiny) -> None:
    """Brute force: each answer alone, document and all in one forward of transformers."""
    model, _ = tiny.pair("llama")
    draw = torch.Generator().manual_seed(0)
    doc, *texts = (torch.randint(3, 67, (n,), generator=draw).tolist() for n in (15, 4, 2, 7, 3, 5, 1))
    prompts, answers = texts[::2], texts[1::2]
    found = log_probabilities(model, [document.read(model, doc)], prompts, answers)
    for one, prompt, answer in zip(found, prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([doc + prompt + answer])).logits[0].log_softmax(-1)
        start = len(doc) + len(prompt) - 1
        assert one == pytest.approx(sum(float(logits[start + i, t]) for i, t in enumerate(answer)), abs=1e-3)


@pytest.mark.parametrize(
    ("leave_out", "match"),
    [("--corpus", "needs --corpus:"), ("--prompts", "needs --prompts:"), ("-a", "needs -a:")],
)
def test_what_is_missing_is_said(made, leave_out, match) -> None:
    given = {"--corpus": made["document.txt"], "--prompts": made["questions.jsonl"], "-a": made["small"]}
    options = [part for name, value in given.items() if name != leave_out for part in (name, value)]
    result = run(made["model"], "--suite", "cartridge", *options)
    assert result.exit_code != 0 and match in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("--concurrency", "1,x", "as in 1,4"),
        ("--concurrency", "0", "all must be 1 or more"),
        ("--repeat", 0, "all must be 1 or more"),
        ("--max-new-tokens", 1, "must be 2 or more"),
        ("-a", "one+", "A+B names two cartridges"),
    ],
)
def test_bad_choices_are_refused_in_one_line(made, option, value, match) -> None:
    base = ["--corpus", made["document.txt"], "--prompts", made["questions.jsonl"], "-a", made["small"]]
    result = run(made["model"], "--suite", "cartridge", *base, option, value)
    assert result.exit_code != 0 and match in result.stderr and result.stderr.count("\n") == 1


def test_another_document_and_questions_without_answers_are_refused(made, tmp_path) -> None:
    other, bare = tmp_path / "other.txt", tmp_path / "bare.jsonl"
    other.write_text("Something else.")
    bare.write_text(json.dumps({"question": "Who?"}) + "\n")
    base = [made["model"], "--suite", "cartridge", "-a", made["small"]]
    result = run(*base, "--corpus", other, "--prompts", made["questions.jsonl"])
    assert result.exit_code != 0 and "none of the documents that the cartridges" in result.stderr
    result = run(*base, "--corpus", made["document.txt"], "--prompts", bare)
    assert result.exit_code != 0 and "needs an answer" in result.stderr
    result = run(*base, "--corpus", made["document.txt"], "--prompts", bare, "--turns", 2)
    assert result.exit_code != 0 and "does not use --turns" in result.stderr
