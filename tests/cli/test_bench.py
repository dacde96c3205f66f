"""``accel bench``: options reach the plan, stdout stays clean, mistakes are one line. Measuring is tested elsewhere."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import accel
from accel.bench import arms, dparallel, drafts, environment, session
from accel.cli.bench import DEFAULT_DRAFT, DEFAULT_MASKED, DEFAULT_MASKED_BASE, DEFAULT_MODEL, bench
from accel.errors import AccelError


class CountingModel:
    """Answers every prompt with 1, 2, 3, …, as transformers' generate would hand it out."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_position_embeddings=4096, vocab_size=10)
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def generate(self, input_ids, max_new_tokens, streamer=None, **kwargs):
        new = torch.arange(1, max_new_tokens + 1)
        if streamer is not None:
            for chunk in (input_ids, *new):
                streamer.put(chunk)
            streamer.end()
        return torch.cat([input_ids, new[None]], dim=1)


class LetterTokenizer:
    chat_template = None
    pad_token_id = 0
    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 97 for letter in text]}

    def decode(self, tokens, skip_special_tokens=False):
        return "x" * len(tokens)


@pytest.fixture
def run(monkeypatch):
    """Invoke the command on a fake runtime; ``run.loaded`` lists what was asked of accel.load, ``run.drafts`` whose
    drafts were looked for."""
    loaded, drafts = [], []

    def find_draft(source, target, **options):
        drafts.append(source)
        return arms.Draft(source)

    def load(name, **options):
        loaded.append((name, options))
        return SimpleNamespace(model=CountingModel(), tokenizer=LetterTokenizer())

    monkeypatch.setattr(accel, "load", load, raising=False)
    monkeypatch.setattr(accel, "attach", lambda model, *artifacts, **options: model, raising=False)
    monkeypatch.setattr(accel, "detach", lambda model: model, raising=False)
    monkeypatch.setattr(accel, "stats", lambda model: None, raising=False)
    monkeypatch.setattr(arms, "find_draft", find_draft)

    def invoke(*words):
        return CliRunner().invoke(bench, words, catch_exceptions=False)

    invoke.loaded, invoke.drafts = loaded, drafts
    return invoke


def test_no_arguments_print_the_table(run):
    result = run()
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "6 prompts × 64 new tokens × 1, greedy" in result.stdout
    for arm in (
        "transformers ",
        "transformers-assisted ",
        "accel-plain ",
        "accel-ngram ",
        "accel-suffix ",
        "accel-lm ",
        "accel-auto ",
    ):
        assert any(line.startswith(arm) for line in result.stdout.splitlines())
    assert run.loaded == [(DEFAULT_MODEL, {"device": "auto", "dtype": "auto"})]
    assert run.drafts == [DEFAULT_DRAFT]


def test_json_is_one_document_on_stdout_and_in_the_file(run, tmp_path):
    output, page = tmp_path / "out.json", tmp_path / "out.html"
    result = run("some/model", "--json", "--arms", "transformers,accel-auto", "--limit", "2", "--max-new-tokens", "5")
    document = json.loads(result.stdout)
    assert document["settings"]["model"] == "some/model"
    assert run.drafts == []  # the draft that ships is for the default model alone
    assert document["arms"]["accel-auto"]["total_output_tokens"] == 12 * 5
    assert "records" not in document
    result = run("--json", "--output", str(output), "--html", str(page), "--save-detailed", "--arms", "accel-plain")
    assert json.loads(result.stdout) == json.loads(output.read_text())
    assert len(json.loads(output.read_text())["records"]) == 6
    assert page.read_text().startswith("<!doctype html>")


def test_every_option_reaches_the_plan(monkeypatch, tmp_path):
    plans = []

    def carry_out(plan, progress):
        plans.append(plan)
        raise AccelError("enough")

    monkeypatch.setattr(session, "carry_out", carry_out)
    words = "m -a d --suite spec-bench --prompts p.jsonl --limit 3 --turns 2 --max-new-tokens 9 --arms transformers"
    words += " --repeat 4 --temperature 0.5 --seed 6 --threads 2 --device cpu --dtype float32 --output o.json --resume"
    with pytest.raises(AccelError, match="enough"):
        CliRunner().invoke(bench, [*words.split(), "--save-detailed"], catch_exceptions=False)
    (plan,) = plans
    assert plan == session.Plan(
        model="m",
        artifacts=("d",),
        suite="spec-bench",
        prompt_file=Path("p.jsonl"),
        limit=3,
        arms="transformers",
        settings=session.Settings(max_new_tokens=9, temperature=0.5, seed=6, repeat=4, turns=2),
        threads=2,
        device="cpu",
        dtype="float32",
        output=Path("o.json"),
        resume=True,
        save_detailed=True,
        command=plan.command,
    )


@pytest.mark.parametrize(
    ("suite", "own", "temperature", "tokens"),
    [
        ("drafts", {"draft_lengths": (3, 5)}, 0.0, 96),
        ("lenience", {"draft_length": 4, "epsilons": (0.5, 0.1)}, 1.0, 256),
    ],
)
def test_suites_with_drafts_get_their_own_plan(monkeypatch, suite, own, temperature, tokens):
    plans = []

    def carry_out(plan, progress):
        plans.append(plan)
        raise AccelError("enough")

    monkeypatch.setattr(import_module(f"accel.bench.{suite}"), "carry_out", carry_out)
    words = f"m -a d --suite {suite} --prompts p.jsonl --limit 3 --repeat 2 --seed 6 --output o.json --resume"
    words += " --draft-length 3,5" if suite == "drafts" else " --draft-length 4 --epsilon 0.5,0.1"
    with pytest.raises(AccelError, match="enough"):
        CliRunner().invoke(bench, words.split(), catch_exceptions=False)
    (plan,) = plans
    assert {name: getattr(plan, name) for name in own} == own
    assert plan.settings == session.Settings(max_new_tokens=tokens, temperature=temperature, seed=6, repeat=2)
    assert (plan.model, plan.artifacts, plan.limit, plan.resume) == ("m", ("d",), 3, True)
    assert (plan.prompt_file, plan.output) == (Path("p.jsonl"), Path("o.json"))


def test_the_masked_suite_gets_its_own_plan(monkeypatch):
    plans = []

    def carry_out(plan, progress):
        plans.append(plan)
        raise AccelError("enough")

    monkeypatch.setattr(dparallel, "carry_out", carry_out)
    words = "m -a b --prompts p.jsonl --limit 3 --max-new-tokens 9 --rows 4 --timed 8 --repeat 2 --no-sweep"
    words += " --device cpu --dtype float32 --output o.json"
    for given in ("", words):
        with pytest.raises(AccelError, match="enough"):
            CliRunner().invoke(bench, ["--suite", "dparallel", *given.split()], catch_exceptions=False)
    shipped, plan = plans
    assert shipped == dparallel.Plan(DEFAULT_MASKED, DEFAULT_MASKED_BASE, command=shipped.command)
    assert (shipped.rows, shipped.timed, shipped.repeat, shipped.sweep) == (16, 32, 3, True)
    assert plan == dparallel.Plan(
        model="m",
        base="b",
        questions=Path("p.jsonl"),
        limit=3,
        max_new_tokens=9,
        rows=4,
        timed=8,
        repeat=2,
        sweep=False,
        device="cpu",
        dtype="float32",
        output=Path("o.json"),
        command=plan.command,
    )


def test_plots_are_saved_alone_and_in_the_page(monkeypatch, tmp_path):
    document = {"arms": {}, "drafts": {}, "rows": [], "prompts": 0, "complete": True, "notes": []}
    document |= {"settings": {"draft_lengths": [3], "model": "m", "dtype": "f", "max_new_tokens": 1, "repeat": 1}}
    document |= {"environment": environment.describe(), "command": "", "date": ""}
    monkeypatch.setattr(drafts, "carry_out", lambda plan, progress: document)
    files = tmp_path / "p.svg", tmp_path / "p.html"
    words = ["-a", "d", "--suite", "drafts", "--svg", str(files[0]), "--html", str(files[1])]
    result = CliRunner().invoke(bench, words, catch_exceptions=False)
    assert result.exit_code == 0 and "greedy and at temperature 1" in result.stdout
    assert files[0].read_text().startswith("<svg") and files[1].read_text().count("<svg") == 2


def test_a_prompt_file_is_spec_bench_with_its_own_defaults(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question_id": 1, "category": "qa", "turns": ["x"]}\n')
    document = json.loads(run("--prompts", str(file), "--json", "--arms", "transformers").stdout)
    assert document["settings"]["suite"] == "spec-bench"
    assert document["arms"]["transformers"]["total_output_tokens"] == 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--suite", "mt"],
            "unknown suite 'mt': choose from cartridge, cascade, default, dparallel, drafts, kernels, lawcat, "
            "lenience, spec-bench",
        ),
        (["--suite", "spec-bench"], "--prompts FILE"),
        (["--prompts", "no-such-file"], "cannot read prompts from no-such-file"),
        (["--arms", "fast"], "unknown arm 'fast'"),
        (["--resume"], "--output FILE"),
        (["--repeat", "0"], "repeat=0"),
        (["--limit", "0"], "limit=0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--temperature", "-1"], "temperature=-1"),
        (["-a", "x", "-a", "y"], "2 artifacts.*--suite drafts"),
        (["m", "--suite", "drafts"], "one or more with -a"),
        (["--suite", "drafts", "-a", "x", "--draft-length", "3,x"], "--draft-length '3,x': give numbers"),
        (["--suite", "drafts", "-a", "x", "--draft-length", "0"], "draft_length=0"),
        (["--suite", "lenience", "--prompts", "p", "-a", "x", "--draft-length", "3,5"], "takes one"),
        (["m", "--suite", "lenience", "--prompts", "p"], "takes one draft model"),
        (["--suite", "lenience", "--prompts", "p", "-a", "x", "--epsilon", "2"], "ε=2.0"),
        (["--suite", "lenience", "-a", "x"], "--prompts FILE"),
        # nothing is ignored in silence
        (["--suite", "drafts", "-a", "x", "--temperature", "1"], "'drafts' does not use --temperature"),
        (["--suite", "lenience", "-a", "x", "--turns", "2"], "'lenience' does not use --turns"),
        (["--suite", "lenience", "-a", "x", "--arms", "lin 0.5"], "'lenience' does not use --arms"),
        (["--epsilon", "0.5"], r"'default' does not use --epsilon: leave it out \(used by: lenience\)"),
        (["--svg", "x.svg"], "'default' does not use --svg"),
        (["--suite", "steps", "-a", "x"], "'steps' does not use --artifact"),
        (["--suite", "steps", "--temperature", "0"], "'steps' does not use --temperature"),
        (["some/model", "--suite", "kernels"], "'kernels' does not use MODEL"),
        (["--suite", "kernels", "--limit", "2"], "'kernels' does not use --limit"),
        (["--timed", "2"], r"'default' does not use --timed: leave it out \(used by: dparallel\)"),
        (["m", "--suite", "dparallel", "--resume"], "'dparallel' does not use --resume"),
        (["m", "--suite", "dparallel", "-a", "x", "-a", "y"], "-a x, y: suite 'dparallel' takes the one"),
        (["m", "--suite", "dparallel", "--rows", "0"], "rows=0"),
        (["m", "--suite", "dparallel", "--timed", "0"], "timed=0"),
        (["m", "--suite", "dparallel", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["m", "--suite", "dparallel", "--no-sweep", "--svg", "x.svg"], "--svg x.svg with --no-sweep"),
        (["m", "--suite", "dparallel", "--output", "x.svg"], "cannot be one file"),
        (["m", "--suite", "dparallel", "--prompts", "no-such-file"], "cannot read prompts from no-such-file"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(run, words, message):
    with pytest.raises(AccelError, match=message):
        run(*words)
    assert run.loaded == []


def test_progress_only_on_a_terminal(run, monkeypatch):
    assert "\r" not in run("--arms", "transformers").output
    monkeypatch.setattr("accel.cli.common.Progress.__init__", _always_shown)
    result = run("--arms", "transformers", "--json")
    assert "5/6 · prompt 503 (rag) · transformers · about 0 s left" in result.stderr
    json.loads(result.stdout)


def _always_shown(self, stream=None):
    import sys

    self._stream = sys.stderr
    self._shown = True
