"""`accel distill demos` and `accel generate --method cascade`, against servers on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from byte_models import save_byte_llama
from cascade_server import fails, says, serving
from click.testing import CliRunner, Result

from accel.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_demonstrations_are_collected_and_used(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "demos"
    with serving(says("That is 4.")) as big:
        given = ("--prompts", prompts, "--output", output, "--system", "Add.")
        result = run("distill", "demos", f"gpt-4.1@{big.url}", *given)
        asked = big.bodies[0]["messages"]
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    # one of four: 2 + 2
    assert "1 demonstrations; 1 of 4 tasks succeeded" in result.stdout and "$0.000" in result.stdout
    assert asked == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "Question: What is 1 + 1?\nAnswer:"},
    ]
    made = json.loads((output / "accel.json").read_text())
    assert (made["kind"], made["base"]["name"]) == ("demos", "gpt-4.1") and made["measured"]["tasks"] == 4
    assert run("artifact", "verify", output).exit_code == 0

    folder = save_byte_llama(tmp_path / "model", max_position_embeddings=2048)
    with serving(says("four")) as big:
        given = ("-m", folder, "-a", output, "--method", "cascade", "--max-new-tokens", "2", "--seed", "0", "--stats")
        result = run("generate", *given, "-o", f"teacher=gpt-4.1@{big.url}", "-o", "temperature=2", "What is 2 + 2?")
        again = run("generate", *given[:-1], "-o", f"teacher=gpt-4.1@{big.url}", "--json", "What is 2 + 2?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "four\n"
    assert "escalated: " in result.stderr and "1 demonstrations" in result.stderr
    document = json.loads(again.stdout)
    assert document["prompt"] == "What is 2 + 2?" and document["attempts"] and "agreement" in document


def test_a_collection_goes_on_behind_a_teacher_that_failed(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "demos"
    with serving(says("2"), says("4"), fails(400)) as big:
        result = run("distill", "demos", f"big@{big.url}", "--prompts", prompts, "--output", output)
        assert result.exit_code == 1 and result.output.startswith("Error: big at http") and not output.exists()
        big.script[:] = [says("6"), says("9")]
        result = run("distill", "demos", f"big@{big.url}", "--prompts", prompts, "--output", output, "--json")
        assert len(big.bodies) == 5
    assert json.loads(result.stdout)["measured"]["successes"] == 3


WORLD = """
SYSTEM = "Count up."
class Task:
    goal = "two"
    def __init__(self, number): self.number = number
    def __str__(self): return f"task {self.number}"
def tasks(count, seed): return [Task(number) for number in range(count)]
class Episode:
    def __init__(self, task): self.value, self.done, self.success, self.observation = 0, False, False, "at 0"
    def act(self, action):
        self.value += 1
        self.observation = f"at {self.value}"
        self.done = self.success = self.value == 2
"""


def test_an_environment_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_world.py").write_text(WORLD)
    monkeypatch.syspath_prepend(str(tmp_path))
    output = tmp_path / "demos"
    with serving(says("up")) as big:
        given = ("--environment", "counting_world", "--count", "3", "--output", output)
        result = run("distill", "demos", f"big@{big.url}", *given)
    sys.modules.pop("counting_world", None)
    assert result.exit_code == 0, result.output
    lines = (output / "demonstrations.jsonl").read_text().splitlines()
    assert [step["observation"] for step in json.loads(lines[2])["steps"]] == ["at 0", "at 1"]
    assert "unknown, no price" in result.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "no --output"),
        (("--output", "x"), "give --prompts or --environment"),
        (("--output", "x", "--environment", "no_such_module"), "cannot be imported"),
        (("--output", "x", "--environment", "json"), "has no SYSTEM, tasks, Episode"),
        (("--output", "x", "--environment", "json", "--check", "exact"), "--system and --check are for --prompts"),
        (("--output", "x", "--prompts", "no-such-file"), "no-such-file"),
        (("--output", ".", "--environment", "json"), "exists already"),
    ],
)
def test_mistakes_are_one_line(given: tuple[str, ...], says: str) -> None:
    result = run("distill", "demos", "big@http://127.0.0.1:1/v1", *given)
    assert result.exit_code != 0
    assert says in result.output and len(result.output.strip().splitlines()) == 1


def test_choices_that_a_cascade_lacks_are_refused() -> None:
    for given in (("--raw",), ("--top-p", "0.5"), ("--top-k", "3")):
        result = run("generate", "--method", "cascade", *given, "hello")
        assert result.exit_code != 0 and "do not go with method 'cascade'" in result.output
