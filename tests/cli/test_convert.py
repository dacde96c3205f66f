"""`accel artifact convert` of linear attention: the authors' files become an artifact; what they leave out is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import save_byte_llama
from click.testing import CliRunner, Result
from linear_models import random_tensors
from safetensors.torch import save_file

from accel.artifacts import open_artifact
from accel.cli.main import main
from accel.methods.lawcat.artifact import Lawcat
from accel.methods.lawcat.published import published_names
from accel.models.linear import LinearSpec, LowRank
from accel.models.loading import load_model


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


@pytest.fixture
def ours(folder: Path) -> Lawcat:
    model = load_model(str(folder), device="cpu", dtype="float32")[0]
    heads = model.config.hidden_size // model.config.num_attention_heads
    spec = LinearSpec(layers=(0, 1), feature_size=heads // 2, gate_rank=3)
    low_rank = LowRank(2, 16.0)
    return Lawcat.of("ours", spec, random_tensors(model.config, spec, low_rank), model, low_rank=low_rank)


@pytest.fixture
def stages(ours: Lawcat, tmp_path: Path) -> list[Path]:
    """Stage 1 as the authors' trainer saves it, stage 2 as a hub would."""
    theirs = published_names(ours)
    torch.save(
        {"model_state_dict": {name: each for name, each in theirs.items() if "lora" not in name}, "step": 7},
        tmp_path / "distill.pt",
    )
    save_file(
        {name: each.contiguous() for name, each in theirs.items() if "lora" in name}, tmp_path / "lora.safetensors"
    )
    return [tmp_path / "distill.pt", tmp_path / "lora.safetensors"]


def test_both_stages_become_one_artifact(folder: Path, ours: Lawcat, stages: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "theirs"
    given = ("artifact", "convert", *stages, "--model", folder, "--output", output, "--format", "lawcat")
    result = run(*given, "--lora-alpha", "16")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 2 linear layers, lawcat, for {folder}\n"
    model, tokenizer = load_model(str(folder), device="cpu", dtype="float32")
    artifact = open_artifact(output)
    found = Lawcat.load(artifact, model, tokenizer)
    assert (found.spec, found.low_rank) == (ours.spec, ours.low_rank)
    assert all(torch.equal(found.tensors[name], each) for name, each in ours.tensors.items())
    assert artifact.manifest.made == {"source": "distill.pt, lora.safetensors", "format": "lawcat"}
    assert artifact.manifest.base.tokenizer_digest is not None
    assert run("generate", "-m", folder, "-a", output, "say 3", "--max-new-tokens", "4").exit_code == 0


def test_choices_that_no_tensor_tells(folder: Path, stages: list[Path], tmp_path: Path) -> None:
    given = ("artifact", "convert", stages[0], "--model", folder, "--format", "lawcat", "--output", tmp_path / "x")
    assert run(*given, "-o", "normalised=false", "-o", "activation=silu").exit_code == 0
    spec = open_artifact(tmp_path / "x").manifest.parameters["spec"]
    assert (spec["normalised"], spec["activation"]) == (False, "silu")


@pytest.mark.parametrize(
    ("which", "more", "said"),
    [
        ((0,), (), "say --format lawcat or lolcats"),
        ((0,), ("--format", "lawkat"), "unknown format 'lawkat'"),
        ((0, 1), ("--format", "lawcat"), "give lora_alpha"),
        ((0,), ("--format", "lawcat", "-o", "window=big"), "window is 'big'"),
        ((0,), ("--format", "lawcat", "-o", "layers=1"), "'layers' is no choice here"),
        ((0,), ("--format", "lolcats"), "rope with a conv"),
        ((0,), ("--format", "lawcat", "--positions", "9"), "--positions 9 is not for a lawcat"),
        ((0,), ("--lora-alpha", "16"), "--lora-alpha 16.0 is not for a cartridge"),
        ((0, 1), (), "a cartridge is one"),
    ],
)
def test_refusals(folder: Path, stages: list[Path], tmp_path: Path, which: Any, more: Any, said: str) -> None:
    files = [stages[i] for i in which]
    result = run("artifact", "convert", *files, "--model", folder, "--output", tmp_path / "x", *more)
    assert result.exit_code != 0 and said in result.stderr, result.output
    assert result.stderr.count("\n") <= 3 and not (tmp_path / "x").exists()


def test_a_file_that_holds_no_parameters_by_name(folder: Path, tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    given = ("artifact", "convert", tmp_path / "list.pt", "--model", folder, "--output", tmp_path / "x")
    result = run(*given, "--format", "lawcat")
    assert result.exit_code != 0 and "holds no tensors by name" in result.stderr
