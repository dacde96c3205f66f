"""The suite `lawcat` on a tiny model, and the tasks that it asks: lengths, answers, break-even, bars, refusals."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from byte_models import byte_llama
from click.testing import CliRunner, Result
from linear_models import random_tensors

import accel
from accel.bench import lawcat as suite
from accel.bench import lawcat_report, passkey
from accel.cli.main import main
from accel.errors import OptionError
from accel.methods.lawcat.artifact import Lawcat
from accel.models.linear import LinearSpec

POSITIONS = 256
FAST = ("--limit", 2, "--repeat", 1, "--max-new-tokens", 3, "--digits", 3)


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments), "--suite", "lawcat"])


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A model of 256 positions; a delta that says that it was trained with 64 tokens, and one that says nothing."""
    where = tmp_path_factory.mktemp("lawcats")
    model = byte_llama(max_position_embeddings=POSITIONS)
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    spec = LinearSpec(layers=(0, 1), feature_size=8, gate_rank=3)
    found = Lawcat.of("delta", spec, random_tensors(model.config, spec), model, tokenizer)
    found.save(where / "delta", measured={"training_length": 128})
    found.save(where / "silent")
    half = LinearSpec(layers=(1,), feature_size=8, gate_rank=3)
    Lawcat.of("half", half, random_tensors(model.config, half), model, tokenizer).save(where / "half")
    (where / "text.txt").write_text("A crab sat on the quay. " * 40)
    return {each.name: each for each in where.iterdir()}


def test_a_run_measures_both_by_length(made, tmp_path) -> None:
    output, page, drawn = (tmp_path / name for name in ("out.json", "out.html", "out.svg"))
    given = ["-a", made["delta"], "--lengths", "128,256,512", "--concurrency", "2", "--corpus", made["text.txt"], *FAST]
    result = run(made["model"], *given, "--output", output, "--html", page, "--svg", drawn)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    settings = found["settings"]
    assert (settings["lengths"], settings["positions"], settings["training_length"]) == ([128, 256, 512], 256, 128)
    assert settings["concurrency"] == [1, 2] and settings["converted"] == settings["layers"] == 2
    for rows in found["retrieval"].values():
        assert [(row["length"], row["tasks"]) for row in rows] == [(128, 2), (256, 2), (512, 2)]
        assert all(len(row[arm]["right"]) == 2 for row in rows for arm in ("softmax", "linear"))
    # 960 tokens in rows of 512: 511 and 447 losses
    assert [row["tokens"] for row in found["perplexity"]] == [256, 256, 446]
    assert [row["length"] for row in found["prefill"]] == [128, 256, 512]
    assert {size: len(rows) for size, rows in found["decode"].items()} == {"1": 3, "2": 3}
    # keys and values grow with the prompt, a state does not
    softmax, linear = ([row[arm] for row in found["state"]] for arm in ("softmax", "linear"))
    assert softmax[2] > 1.8 * softmax[1] > 3 * softmax[0] and len(set(linear)) == 1
    assert found["verdicts"]["state"]["met"] is True
    assert (found["verdicts"]["growth"]["from"], found["verdicts"]["growth"]["to"]) == (256, 512)
    # no length is 8 times what it was trained with
    assert found["verdicts"]["passkey"] == {"value": None, "bar": 0.9, "met": None, "length": None}
    assert "512* " in result.stdout and "256* " not in result.stdout and "beyond the 256 positions" in result.stdout
    assert "Break-even" in result.stdout and "not measured here" in result.stdout
    assert "Perplexity by position" in page.read_text() and drawn.read_text().startswith("<svg")


def test_perplexity_is_the_models_own(made, tokenizer) -> None:
    """By hand, one forward of transformers a row, without and with the delta."""
    model = byte_llama(max_position_embeddings=POSITIONS)
    delta = Lawcat.load(accel.artifacts.open_artifact(made["delta"]), model, tokenizer)
    arms = [suite.attached("softmax", method="plain"), suite.attached("linear", delta, method="plain")]
    text = made["text.txt"].read_text()
    ids = tokenizer(text)["input_ids"][:200]
    found = suite._perplexity(tokenizer.decode(ids), [50, 128], arms, model, tokenizer)
    # rows of 128 and of 72 tokens
    assert [(row["from"], row["to"], row["tokens"]) for row in found] == [(0, 50, 100), (50, 128, 98)]
    for name in ("softmax", "linear"):
        if name == "linear":
            delta.conversion(model).install()
        sums = torch.zeros(2)
        for row in (ids[:128], ids[128:]):
            with torch.no_grad():
                scores = model(torch.tensor([row]), use_cache=False).logits[0, :-1].log_softmax(-1)
            losses = -scores[torch.arange(len(row) - 1), torch.tensor(row[1:])]
            sums += torch.stack([losses[:50].sum(), losses[50:].sum()])
        wanted = sums / torch.tensor([100, 98])
        assert [row[name] for row in found] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_a_model_that_finds_the_number_is_right(made, tokenizer, monkeypatch) -> None:
    """Replies are judged one by one, each by its own answer."""
    model = byte_llama(max_position_embeddings=POSITIONS)
    tasks = [passkey.passkey(random.Random(seed), 160, tokenizer, digits=3) for seed in range(3)]
    asked = [suite.Asked(task.ids, 160, task.right, 5) for task in tasks]
    said = [f" {tasks[0].answer}.", " 7", f" {tasks[2].answer}7"]

    def generate(input_ids, **kwargs):
        new = torch.tensor([tokenizer(each.ljust(5))["input_ids"] for each in said])
        assert kwargs["max_new_tokens"] == 5
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(model, "generate", generate)
    assert suite._marks(asked, model, tokenizer) == [True, False, False]


def test_questions_of_ones_own_stand_at_their_lengths(made, tmp_path) -> None:
    file = tmp_path / "own.jsonl"
    rows = [{"question": "x" * size, "answer": "y", "category": f"c{size}"} for size in (20, 100, 60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [made["model"], "-a", made["silent"], "--prompts", file, "--corpus", made["text.txt"]]
    given += ["--repeat", 1, "--max-new-tokens", 3, "--concurrency", "1"]
    result = run(*given, "--lengths", "64,128", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["length"], row["tasks"]) for row in found["retrieval"]["prompts"]] == [(64, 2), (128, 1)]
    assert found["settings"]["training_length"] is None and "prompts" not in found["verdicts"]
    result = run(*given, "--lengths", "64")
    assert result.exit_code == 1 and "question 2 has 100 tokens and the longest length is 64" in result.stderr


def test_what_is_asked_and_what_is_timed(made, tokenizer) -> None:
    plan = suite.Plan("m", "d", limit=4, digits=3)
    asked = suite._asked(plan, tokenizer, (200, 400))
    for task, found in asked.items():
        assert [each.length for each in found] == [len(each.ids) for each in found] == [200] * 4 + [400] * 4, task
        # a space, three digits, and room for one more that would make it another number
        assert {each.max_new_tokens for each in found} == {5}
        # the number stands deeper and deeper
        places = [tokenizer.decode(each.ids).index("is the pass" if task == "passkey" else "number") for each in found]
        assert places[:4] == sorted(places[:4]) and places[4:] == sorted(places[4:])
    # rows with the same prompt would share one prefill and one copy of its state
    clock = suite._Clock(plan, (64,), [], byte_llama(max_position_embeddings=64), tokenizer, print)
    assert len({clock._text(64, row) for row in range(4)}) == 4 and len(clock._text(64, 0)) == 64


def test_the_models_positions_are_what_they_were(made) -> None:
    model = byte_llama(max_position_embeddings=POSITIONS)
    with suite._room_for(model, 4096):
        assert model.config.max_position_embeddings == 4096
    assert model.config.max_position_embeddings == POSITIONS
    with suite._room_for(model, 100):
        assert model.config.max_position_embeddings == POSITIONS


@pytest.mark.parametrize(
    ("delta", "goes"), [("delta", True), ("half", False)], ids=["all layers linear", "some layers softmax"]
)
def test_linear_layers_need_no_positions(made, tokenizer, delta, goes) -> None:
    """What the suite measures beyond the positions is what attach() allows, where every layer is converted."""
    model = byte_llama(max_position_embeddings=POSITIONS)
    accel.attach(model, made[delta], method="plain", tokenizer=tokenizer)
    prompt = torch.arange(POSITIONS + 40)[None] % 200 + 1
    if goes:
        assert model.generate(prompt, max_new_tokens=2).shape == (1, POSITIONS + 42)
    else:
        with pytest.raises(OptionError, match="the prompt takes 296 positions"):
            model.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize(
    ("speedups", "wanted"),
    [([2.0, 3.0], 128), ([0.5, 1.2], 256), ([1.5, 0.9], None), ([1.2, 0.9, 1.1], 512), ([0.5, 1.0], None)],
)
def test_break_even_is_from_where_on_it_is_faster(speedups, wanted) -> None:
    rows = [{"length": 128 << n, "speedup": [each, 0, 0]} for n, each in enumerate(speedups)]
    assert suite.break_even(rows) == wanted


def test_the_bars_say_what_was_missed() -> None:
    accuracy = lambda share: {"accuracy": share}  # noqa: E731
    document = {
        "settings": {"training_length": 64},
        "retrieval": {
            "passkey": [{"length": n, "linear": accuracy(a)} for n, a in ((256, 1.0), (512, 0.8), (1024, 1.0))],
            "needle": [{"length": 512, "linear": accuracy(0.9)}],
        },
        "growth": [{"from": 256, "to": 512, "linear": [2.5, 2, 3]}, {"from": 512, "to": 1536, "linear": [3.0, 3, 3]}],
        "state": [{"length": 256, "linear": 10}, {"length": 512, "linear": 11}],
    }
    found = suite._verdicts(document)
    assert found["passkey"] == {"value": 0.8, "bar": 0.9, "met": False, "length": 512}
    assert found["needle"]["met"] is True
    # 1536 is not twice 512
    assert found["growth"] == {"value": 2.5, "bar": 2.2, "met": False, "from": 256, "to": 512}
    assert found["state"]["met"] is False
    lines = [lawcat_report._verdict(name, each) for name, each in found.items()]
    assert [line.rpartition(": ")[2] for line in lines] == ["MISSED", "met", "MISSED", "MISSED"]


@pytest.mark.parametrize("task", passkey.TASKS)
def test_a_task_has_its_length_and_one_answer(tokenizer, task) -> None:
    make = passkey.TASKS[task]
    for tokens in (170, 171, 400, 1003):
        for depth in (0.0, 0.5, 1.0, None):
            found = make(random.Random(tokens), tokens, tokenizer, digits=4, depth=depth)
            assert len(found.ids) == tokens and tokenizer(found.question)["input_ids"] == list(found.ids)
            assert re.fullmatch("[1-9][0-9]{3}", found.answer) and found.question.endswith(" is")
            said = found.question.split("What is")[0]
            assert said.count(found.answer) == (2 if task == "passkey" else 1)
            assert found.depth == pytest.approx(depth, abs=0.15) if depth is not None and tokens > 900 else True
    same = [make(random.Random(5), 300, tokenizer).ids for _ in range(2)]
    assert same[0] == same[1] != make(random.Random(6), 300, tokenizer).ids


def test_a_task_that_does_not_fit_is_refused(tokenizer) -> None:
    with pytest.raises(OptionError, match="tokens=50: the task itself has"):
        passkey.passkey(random.Random(0), 50, tokenizer)
    with pytest.raises(OptionError, match="digits=0"):
        passkey.needle(random.Random(0), 500, tokenizer, digits=0)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (" 123.", True),
        ("123", True),
        ("is 1 2 3 4", False),
        (" 1 2 3.", True),
        ("1234", False),
        ("12", False),
        ("", False),
        (" 9, or 123", False),
    ],
)
def test_the_first_number_of_a_reply_counts(said, wanted) -> None:
    assert passkey.right(said, "123") is wanted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name it with -a"),
        (["-a", "{delta}", "-a", "{silent}"], "holds one conversion against MODEL"),
        (["-a", "{silent}"], "does not say which length it was trained with: give --lengths"),
        (["-a", "{delta}", "--lengths", "64,x"], "--lengths 64,x: whole numbers"),
        (["-a", "{delta}", "--lengths", "0"], "lengths=(0,)"),
        (["-a", "{delta}", "--limit", "0"], "limit=0"),
        (["-a", "{delta}", "--max-new-tokens", "1"], "max_new_tokens=1"),
        (["-a", "{delta}", "--corpus", "{missing}"], "cannot read the text"),
        (["-a", "{delta}", "--corpus", "a", "--corpus", "b"], "takes one text"),
        (["-a", "{delta}", "--rows", "2"], "does not use --rows"),
        (["-a", "{delta}", "--lengths", "40"], "the task itself has"),
        (["-a", "smollm2-135m-draft"], "is a draft artifact: a lawcat one is wanted"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(made, tmp_path, arguments, says) -> None:
    places = {name: str(path) for name, path in made.items()} | {"missing": str(tmp_path / "missing")}
    result = run(made["model"], *(each.format(**places) for each in arguments))
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert says in result.stderr and result.stderr.count("\n") == 1
