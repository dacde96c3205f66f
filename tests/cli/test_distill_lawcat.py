"""`accel distill lawcat`: from a model folder and texts to an artifact that generates, a plan, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_models import save_byte_llama
from click.testing import CliRunner, Result

from accel.cli.main import main

SMALL = (
    "--length 24 --batch-tokens 48 --transfer-steps 4 --tune-steps 3 --lora-rank 2 --gate-rank 2 --held-out 0.2 "
    "--checkpoint-every 2".split()
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": f"{i} {i + 1}"}) + "\n" for i in range(40)))
    return file


def test_a_conversion_is_made_reported_and_used(folder: Path, prompts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one two three four five six seven eight nine ten. " * 6)
    output = tmp_path / "lawcat"
    given = ("--prompts", prompts, "--corpus", corpus, "--output", output, *SMALL)
    result = run("distill", "lawcat", folder, *given, "--keep-softmax", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for text in ("as saved", "after stage 1", "rise alone", "softmax", "linear", "→"):
        assert text in result.stdout
    made = json.loads((output / "accel.json").read_text())
    assert made["kind"] == "lawcat" and made["base"]["name"] == str(folder)
    assert made["made"]["command"].startswith("accel") and made["parameters"]["lora"] == {"rank": 2, "alpha": 16.0}
    assert (tmp_path / "lawcat.work" / "tuning").is_dir()
    used = run("generate", "-m", folder, "-a", output, "say 3", "--max-new-tokens", "4", "--json")
    assert used.exit_code == 0, used.output
    assert json.loads(used.stdout)["stats"]["state_bytes"] > 0
    assert run("artifact", "verify", output).exit_code == 0


def test_the_report_as_json_and_the_form_that_was_asked_for(folder: Path, prompts: Path, tmp_path: Path) -> None:
    form = ["--layers", "1", "--no-conv", "--no-denominator", "--tie-maps", "--tune-own", "--kl", "0"]
    given = ("--prompts", prompts, "--output", tmp_path / "x", "--work", tmp_path / "w", *SMALL)
    result = run("distill", "lawcat", folder, *given, *form, "--gate-rank", "full", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    spec = document["spec"]
    assert (spec["layers"], spec["conv_width"], spec["gate_rank"], spec["normalised"]) == ([1], 0, None, False)
    assert document["made"]["recipe"]["kl"] == 0 and document["made"]["recipe"]["tune_own"]
    assert {"teacher", "transferred", "student", "transfer"} <= set(document["measured"])
    assert (tmp_path / "w").is_dir()


def test_the_plan_writes_nothing(folder: Path, prompts: Path, tmp_path: Path) -> None:
    given = ("distill", "lawcat", folder, "--prompts", prompts, "--plan", *SMALL)
    result = run(*given, "--output", tmp_path / "x")
    assert result.exit_code == 0, result.output
    assert "layers to convert: 0, 1" in result.stdout and "disk: at most" in result.stdout
    assert list(tmp_path.iterdir()) == []
    document = json.loads(run(*given, "--json").stdout)
    disk = document["disk"]
    assert disk["total"] == disk["transfer"] + disk["tuning"] + disk["artifact"]
    assert document["documents"] == 40 and document["tokens"] == document["rows"] * 24


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no --output"),
        (["--plan", "--layers", "0,9"], "layer 9"),
        (["--plan", "--layers", "a"], "by number"),
        (["--plan", "--gate-rank", "much"], "'much'"),
        (["--plan", "--max-disk", "1kB"], "max_bytes=1000"),
        (["--plan", "--length", "4096"], "length=4096"),
        (["--plan", "--window", "4", "--no-denominator"], "window"),
    ],
)
def test_mistakes_are_one_line(folder: Path, prompts: Path, given: list[str], says: str) -> None:
    result = run("distill", "lawcat", folder, "--prompts", prompts, *SMALL, *given)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and says in result.stderr and result.stderr.count("\n") == 1
