"""`accel distill draft`: from a model folder and a file of prompts to an artifact, a plan, and one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from byte_models import save_byte_llama
from click.testing import CliRunner, Result

import accel
from accel.artifacts import open_artifact, tokenizer_digest
from accel.cli.common import parse_bytes, parse_layers
from accel.cli.main import main
from accel.distill.cache import LessonCache
from accel.errors import OptionError

SMALL = "--shape 1x32 --vocabulary 64 --max-new-tokens 8 --longest-prompt 24 --k 4 --steps 4 --batch-tokens 64".split()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["distill", "draft", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte tokenizer, as transformers saves them."""
    return save_byte_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=128)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"say {i}"} for i in range(9)] + [{"question": "x" * 40, "answer": "y"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_draft_is_made_reported_and_used(folder: Path, prompts: Path, tmp_path: Path) -> None:
    result = run(folder, "--prompts", prompts, "--output", tmp_path / "draft", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # progress is for terminals
    for text in ("held out: 1 prompts", "left out: 1 prompts", "greedy: top-1 agreement 0.", "at γ = 7"):
        assert text in result.stdout
    artifact = open_artifact(tmp_path / "draft")
    assert artifact.manifest.base.name == str(folder)
    assert artifact.manifest.made["command"].split()[0] == "accel"
    assert (tmp_path / "draft.work" / "training").is_dir()
    model = accel.load(str(folder), [str(tmp_path / "draft")], drafter="lm", draft_length=2)
    assert isinstance(model.generate("say 3", max_new_tokens=6), str)
    assert model.stats.drafted_tokens > 0


def generate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_a_draft_is_made_from_what_was_served(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    served = {}
    for i in range(6):
        given = ("-m", folder, f"say {i}", "--max-new-tokens", "6", "--json")
        served[f"say {i}"] = json.loads(generate(*given, "--log", log, "--log-max-size", "1MB").stdout)["text"]
        if not i:
            assert json.loads(generate(*given).stdout)["text"] == served["say 0"]
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    tokenizer = accel.load(str(folder)).tokenizer
    assert tokenizer is not None
    texts = {
        tokenizer.decode(row["prompt_tokens"]): tokenizer.decode(row["new_tokens"], skip_special_tokens=True)
        for row in rows
    }
    assert texts == served and len(rows) == 6
    for data in ("fixed", "target"):
        output = tmp_path / data
        result = run(folder, "--prompts", log, "--output", output, "--data", data, *SMALL)
        assert result.exit_code == 0, result.output
        made = open_artifact(output).manifest.made
        assert made["lessons"][data] == 5 and len(made["losses"]) == 4
    # the lessons are the logged rows themselves, but for the one that was held out
    where = tmp_path / "fixed.work" / "fixed"
    description = json.loads((where / "cache.json").read_text())["description"]
    learned = [(each.prompt.tolist(), each.answer.tolist()) for each in LessonCache.open(where, description, 10**9)]
    said = [(row["prompt_tokens"], row["new_tokens"]) for row in rows]
    assert len(learned) == 5 and all(each in said for each in learned)


def test_a_log_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert generate("-m", folder, "say it", "--max-new-tokens", "2", "--log", log).exit_code == 0
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    state = json.loads((other / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(state))
    result = run(other, "--prompts", log, "--plan", *SMALL)
    digests = [tokenizer_digest(accel.load(str(each)).tokenizer) for each in (folder, other)]
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and digests[0] != digests[1]
    assert all(digest in result.stderr for digest in digests) and str(log) in result.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--log-max-size", "1MB"], "log_max_bytes=1000000 without log"),
        (["--log", "{tmp}/log", "--log-max-size", "much"], "'much' is no size"),
        (["--log", "{tmp}/no/log"], "No such file or directory"),
    ],
)
def test_mistakes_about_the_log_are_one_line(folder: Path, tmp_path: Path, given: list[str], says: str) -> None:
    result = generate("-m", folder, "say it", *(each.replace("{tmp}", str(tmp_path)) for each in given))
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and says in result.stderr and result.stderr.count("\n") == 1


def test_the_report_as_json(folder: Path, prompts: Path, tmp_path: Path) -> None:
    given = ["--layers", "1", *SMALL[2:], "--data", "target>draft", "--loss", "jsd", "--weights", "float32", "--json"]
    work = tmp_path / "elsewhere"
    result = run(folder, "--prompts", prompts, "--output", tmp_path / "draft", "--work", work, *given)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["artifact"] == str(tmp_path / "draft")
    assert document["made"]["recipe"]["layers"] == [1] and document["made"]["recipe"]["data"] == "target>draft"
    assert set(document["measured"]["sampled"]["block_efficiency"]) == {"1", "3", "5", "7"}
    assert document["prompts"] + document["held_out"] == 9 and document["too_long"] == 1
    assert work.is_dir() and not (tmp_path / "draft.work").exists()


def test_the_plan_writes_nothing(folder: Path, prompts: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(folder, "--prompts", prompts, "--output", tmp_path / "draft", "--plan", *SMALL)
    assert result.exit_code == 0, result.output
    assert "8 to learn from, 1 held out, 1 too long" in result.stdout
    assert "disk: at most" in result.stdout and "α=0.7" in result.stdout and "1x32x1x1x96" in result.stdout
    assert sorted(tmp_path.iterdir()) == before
    document = json.loads(run(folder, "--prompts", prompts, "--plan", "--json", *SMALL).stdout)
    disk = document["disk"]
    assert disk["total"] == sum(disk["lessons"].values()) + disk["checkpoints"] + disk["artifact"]
    assert all(each["c"] > 0 for each in document["candidates"])


def test_a_bound_that_will_be_reached_is_said_in_the_plan(folder: Path, prompts: Path) -> None:
    disk = json.loads(run(folder, "--prompts", prompts, "--plan", "--json", *SMALL).stdout)["disk"]
    result = run(folder, "--prompts", prompts, "--plan", *SMALL, "--max-disk", str(disk["total"] - 10))
    assert "the last prompts may get none" in result.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no --output"),
        (["--output", "{tmp}"], "exists already: choose another folder"),
        (["--plan", "--loss", "l2"], "unknown loss 'l2': choose from"),
        (["--plan", "--data", "web"], "unknown data source 'web'"),
        (["--plan", "--shape", "big"], "shape 'big'"),
        (["--plan", "--shape", "1x32", "--layers", "0"], "give one of the two"),
        (["--plan", "--layers", "first"], "layers='first'"),
        (["--plan", "--layers", "7"], "choose one or more of the target's 0 to 1"),
        (["--plan", "--max-disk", "much"], "'much' is no size"),
        (["--plan", "--max-disk", "10"], "leaves nothing to learn from"),
        (["--plan", "--longest-prompt", "400"], "the model has 128 positions for both"),
        (["--plan", "--prompts", "{tmp}/none.jsonl"], "cannot read prompts from"),
        (["--plan", "--weights", "int4"], "unknown dtype 'int4'"),
    ],
)
def test_mistakes_are_one_line(folder: Path, prompts: Path, tmp_path: Path, given: list[str], says: str) -> None:
    given = [each.replace("{tmp}", str(tmp_path)) for each in given]
    small = [] if "--layers" in given or "--shape" in given else SMALL[:2]
    lengths = SMALL[2:6] if "--longest-prompt" in given else SMALL[2:]
    result = run(folder, "--prompts", prompts, *small, *lengths, *given)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and says in result.stderr and result.stderr.count("\n") == 1


def test_sizes_and_layers() -> None:
    sizes = {"2GB": 2 * 10**9, "500 mb": 5 * 10**8, "1.5k": 1500, "77": 77}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    assert parse_layers("0, 29") == (0, 29)
    for parse, text in ((parse_bytes, "-2GB"), (parse_bytes, ""), (parse_layers, "-1"), (parse_layers, "")):
        with pytest.raises(OptionError):
            parse(text)
