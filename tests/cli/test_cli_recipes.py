"""What the commands that make artifacts share: refusals before anything is loaded, threads, folders, the document."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_models import byte_llama, save_byte_llama
from click.testing import CliRunner

from accel.cli.main import main
from accel.cli.recipes import Run
from accel.errors import ArtifactError, OptionError

GIVEN = {"model": "m", "output": None, "work": None, "max_disk": "3kB", "weights": "float32", "threads": None}
GIVEN |= {"device": "cpu", "dtype": "auto", "only_plan": False, "as_json": False}


def run(**given: Any) -> Run:
    return Run.of(GIVEN | given)[0]


def test_what_is_not_the_runs_own_is_the_recipes(tmp_path: Path) -> None:
    made, choices = Run.of(GIVEN | {"output": tmp_path / "x", "steps": 3})
    assert choices == {"steps": 3} and made.limits == {"max_bytes": 3000, "dtype": "float32"}
    assert made.target == tmp_path / "x" and made.work_folder == tmp_path / "x.work"
    assert run(output=tmp_path / "x", work=tmp_path / "w").work_folder == tmp_path / "w"
    assert made.signature["name"] == "m" and made.signature["command"].split()[0] == "accel"


def test_outputs_are_looked_at_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no --output"):
        run()
    with pytest.raises(ArtifactError, match="exists already: choose another folder"):
        run(output=tmp_path)
    # a plan writes nothing, and artifacts of several documents go below their folder
    assert run(only_plan=True).output is None and run(only_plan=True, output=tmp_path).output == tmp_path
    assert Run.of(GIVEN | {"output": tmp_path}, several=True)[0].target == tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("draft", "--prompts", "none"),
        ("cartridge", "--corpus", "none"),
        ("lawcat",),
        ("a2d", "none", "--prompts", "none"),
        ("dparallel", "none", "--prompts", "none"),
    ],
    ids=lambda command: command[0],
)
def test_every_recipe_refuses_an_output_that_is_there(command: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["distill", *command, "--output", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {tmp_path} exists already: choose another folder\n"


def test_threads_are_set_and_a_tokenizer_is_needed(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    save_byte_llama(tmp_path / "whole", max_position_embeddings=16)
    byte_llama(max_position_embeddings=16).save_pretrained(tmp_path / "bare")
    try:
        with run(model=str(tmp_path / "whole"), only_plan=True, threads=before + 1).loaded("texts") as (_, model, own):
            assert torch.get_num_threads() == before + 1 and model.config.vocab_size and own("a")["input_ids"]
        bare = run(model=str(tmp_path / "bare"), only_plan=True).loaded("texts")
        with pytest.raises(OptionError, match="bare brings no tokenizer: texts cannot be read without one"), bare:
            pass
        # where none are asked for they stay as they are
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_document_says_what_was_planned_measured_and_made(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = SimpleNamespace(measured={"loss": 1}, made={"seed": 0})
    artifact: Any = SimpleNamespace(path=Path("x"), manifest=manifest)
    prepared = SimpleNamespace(as_dict=lambda: {"disk": 7})
    run(only_plan=True, as_json=True).report(artifact, prepared, "text")
    run(only_plan=True).report(artifact, prepared, "text")
    document, text = capsys.readouterr().out.rsplit("\n}\n", 1)
    assert text == "text\n"
    assert [line.split(":")[0].strip() for line in document.splitlines() if line.startswith('  "')] == [
        '"artifact"',
        '"disk"',
        '"measured"',
        '"made"',
    ]
