"""`accel distill cartridge` from a model folder and text files to artifacts that are verified, loaded and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_models import save_byte_llama
from click.testing import CliRunner, Result

import accel
from accel.artifacts import open_artifact
from accel.cli.main import main
from accel.errors import OptionError
from accel.methods.cartridge import parity
from accel.methods.cartridge.cartridge import Parameters
from accel.methods.cartridge.distill.recipe import Recipe

TEXT = "The ferry Marigold leaves at nine. The lamp was lit in 1903 by Ada Holm. " * 3
SIZES = (
    "--template text --shortest-chunk 20 --longest-chunk 40 --per-chunk 8 --question-tokens 5 "
    "--answer-tokens 6 --k 4 --steps 8 --batch-tokens 512"
).split()
SMALL = ("--conversations", "32", *SIZES)
OWN = ("--conversations", 48)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte tokenizer, as transformers saves them."""
    return save_byte_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "handbook.txt"
    file.write_text(TEXT)
    return file


def test_a_cartridge_is_trained_verified_and_read(folder: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "handbook-cartridge"
    size = ("--compression", 8, *SIZES, "--conversations", 160, "--steps", 40, "--learning-rate", 0.005)
    result = run("distill", "cartridge", folder, "--corpus", corpus, "--output", output, *size)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # progress is for terminals
    assert "27 slots for 219 tokens (8.11x)" in result.stdout
    assert "held-out conversations" in result.stdout
    manifest = open_artifact(output).manifest
    parameters = Parameters.parse(manifest.parameters, "here")
    assert (parameters.tokens, parameters.positions, parameters.sink_tokens) == (27, 27, 1)
    assert parameters.documents[0].tokens == 219 and not parameters.exact and parameters.dtype == "bfloat16"
    assert manifest.base.name == str(folder) and manifest.made["command"].split()[0] == "accel"
    assert len(manifest.made["losses"]) == 40
    assert manifest.measured["divergence"] < manifest.measured["divergence_before"]
    verified = run("artifact", "verify", output)
    assert verified.exit_code == 0 and "all 4 checks passed" in verified.stdout
    rows = json.loads(run("artifact", "verify", output, "--json").stdout)["checks"]
    assert {"model", "parity"} <= {row["name"] for row in rows}
    model = accel.load(str(folder), [str(output)], method="plain")
    with_it, without = (model.generate("When?", max_new_tokens=8, cartridges=names) for names in (None, []))
    assert with_it != without
    generated = run("generate", "-m", folder, "-a", output, "--raw", "--json", "When?")
    assert json.loads(generated.stdout)["stats"]["cartridges"] == ["handbook-cartridge"]


def test_a_killed_run_goes_on_and_a_finished_one_is_not_overwritten(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = ["distill", "cartridge", folder, "--corpus", corpus, "--tokens", 20, "--output", output, *SMALL]
    from accel.methods.cartridge.distill import recipe

    with monkeypatch.context() as killed:
        killed.setattr(recipe, "train", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).exit_code != 0
    assert not output.exists()
    assert run(*arguments).exit_code == 0
    again = run(*arguments)
    assert again.exit_code != 0 and "exists already" in again.output


def test_another_size_learns_from_the_same_conversations(folder: Path, corpus: Path, tmp_path: Path) -> None:
    common = ["distill", "cartridge", folder, "--corpus", corpus, "--work", tmp_path / "work", *SMALL]
    assert run(*common, "--tokens", 20, "--output", tmp_path / "a").exit_code == 0
    lessons = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "handbook").rglob("*.safetensors")}
    assert run(*common, "--tokens", 10, "--output", tmp_path / "b").exit_code == 0
    assert lessons and lessons == {path: path.stat().st_mtime_ns for path in lessons}
    assert len(list((tmp_path / "work").glob("training-*"))) == 2


def test_the_quick_fit_and_the_whole(folder: Path, corpus: Path, tmp_path: Path) -> None:
    common = ["--corpus", corpus, "--template", "text"]
    quick = run(
        "distill", "cartridge", folder, *common, "--method", "compact", "--tokens", 24, "--output", tmp_path / "quick"
    )
    assert quick.exit_code == 0, quick.output
    parameters = Parameters.parse(open_artifact(tmp_path / "quick").manifest.parameters, "here")
    assert (parameters.tokens, parameters.positions, parameters.has_bias) == (24, 219, True)
    whole = ["--method", "whole", "--weights", "float32", "--output", tmp_path / "whole"]
    assert run("distill", "cartridge", folder, *common, *whole).exit_code == 0
    assert open_artifact(tmp_path / "whole").manifest.parameters["exact"]
    model = accel.load(str(folder), [str(tmp_path / "whole")], method="plain")
    behind = model.generate("When?", max_new_tokens=8)
    inside = accel.load(str(folder), method="plain").generate(TEXT + "When?", max_new_tokens=8)
    assert behind == inside and model.stats.lossless
    for name in ("quick", "whole"):
        assert run("artifact", "verify", tmp_path / name).exit_code == 0


def test_documents_of_one_call_learn_to_stand_together(folder: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "harbour.txt"
    other.write_text("The harbour master is Ines Roth. Boats pay four crowns. " * 4)
    arguments = ["--corpus", corpus, "--corpus", other, "--tokens", 20, "--output", tmp_path / "both", *SMALL]
    result = run("distill", "cartridge", folder, *arguments)
    assert result.exit_code == 0, result.output
    parts = [str(tmp_path / "both" / name) for name in ("handbook", "harbour")]
    model = accel.load(str(folder), parts, method="plain")
    model.generate("When?", max_new_tokens=2)
    assert model.stats.cartridges == ["handbook", "harbour"]
    assert not any("not trained" in note for note in model.stats.notes)


def test_training_goes_on_from_a_cartridge(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """One that was trained alone learns to stand beside another; its divergence begins where it was left."""
    first = tmp_path / "alone"
    size = ("--tokens", 20, *SMALL, "--weights", "float32")
    assert run("distill", "cartridge", folder, "--corpus", corpus, "--output", first, *size).exit_code == 0
    other = tmp_path / "atlas.txt"
    other.write_text("The atlas shows nine seas. " * 4)
    both = ("distill", "cartridge", folder, "--corpus", corpus, "--corpus", other)
    result = run(*both, "--from", first, "--output", tmp_path / "pair", *size)
    assert result.exit_code == 0, result.output
    alone, together = (open_artifact(each).manifest for each in (first, tmp_path / "pair" / "handbook"))
    assert together.measured["divergence_before"] == pytest.approx(alone.measured["divergence"], abs=1e-4)
    assert together.made["begun"] == [{"sha256": alone.files["cartridge.safetensors"].sha256}]
    assert len(together.parameters["trained_with"]) == 1 and not alone.parameters["trained_with"]
    begun = ("--corpus", corpus, "--from", first)
    for arguments, match in (
        ((*begun, "--tokens", 21), "are (20, 20, 1, 'text', ''), asked for are (21, 21, 1, 'text', '')"),
        ((*begun, "--tokens", 20, "--from", first), "a second cartridge of the same document"),
        (("--corpus", other, "--from", first, "--tokens", 20), "was made of none of these documents"),
        ((*begun, "--tokens", 20, "--method", "compact"), "trains nothing that could go on"),
    ):
        result = run("distill", "cartridge", folder, *arguments, "--output", tmp_path / "no", *SMALL)
        assert result.exit_code != 0 and match in result.stderr.replace("\n", " "), result.output
    fitted = tmp_path / "fitted"
    quick = ("--tokens", 20, "--method", "compact", "--template", "text", "--output", fitted)
    assert run("distill", "cartridge", folder, "--corpus", corpus, *quick).exit_code == 0
    result = run("distill", "cartridge", folder, *begun[:2], "--from", fitted, "--output", tmp_path / "no", *size)
    assert result.exit_code != 0 and "bias" in result.stderr


def test_a_plan_writes_nothing(folder: Path, corpus: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    result = run("distill", "cartridge", folder, "--corpus", corpus, "--compression", 4, "--plan", *SMALL)
    assert result.exit_code == 0 and "54 slots for 219 tokens" in result.stdout and "disk: at most" in result.stdout
    assert "32 conversations" in result.stdout
    assert set(tmp_path.rglob("*")) == before
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:73])  # a third of the document is asked about a third as often
    both = ("--corpus", corpus, "--corpus", short)
    result = run("distill", "cartridge", folder, *both, "--compression", 4, "--plan", "--json", *SMALL)
    assert [each["conversations"] for each in json.loads(result.stdout)["documents"]] == [32, 11]
    result = run("distill", "cartridge", folder, *both, "--compression", 4, "--plan", "--json", *SMALL, *OWN)
    assert [each["conversations"] for each in json.loads(result.stdout)["documents"]] == [32, 48]
    result = run("distill", "cartridge", folder, "--corpus", corpus, "--compression", 4, "--plan", *SMALL, *OWN)
    assert result.exit_code == 1 and "conversations=(32, 48) for 1 documents: give one number" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--tokens", "9", "--compression", "2"], "give one of the two"),
        ([], "give one of the two"),
        (["--compression", "0.5"], "compression=0.5"),
        (["--tokens", "500"], "has only 219"),
        (["--tokens", "1"], "sink_tokens=1 leave none"),
        (["--tokens", "9", "--method", "magic"], "unknown method 'magic'"),
        (["--tokens", "9", "--method", "whole"], "keeps every token"),
        (["--tokens", "9", "--max-disk", "1kb"], "max_bytes=1000"),
        (["--tokens", "9", "--longest-chunk", "500"], "longest_chunk=500: with question and answer up to 636"),
        (["--tokens", "9", "--template", "system"], "no chat template: use template text"),
    ],
)
def test_bad_choices_are_refused_in_one_line(
    folder: Path, corpus: Path, tmp_path: Path, arguments: list[str], match: str
) -> None:
    fitting = ["--template", "text", "--longest-chunk", 256, "--question-tokens", 8]
    given = ["--corpus", corpus, "--output", tmp_path / "x", *fitting, *arguments]
    result = run("distill", "cartridge", folder, *given)
    assert result.exit_code != 0 and match in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_documents_that_cannot_be_read_are_refused(folder: Path, corpus: Path, tmp_path: Path) -> None:
    empty, twin = tmp_path / "empty.txt", tmp_path / "copy.txt"
    empty.write_text(" \n")
    twin.write_text(TEXT)
    for files, match in (([tmp_path / "none.txt"], "cannot read"), ([empty], "is empty"), ([corpus, twin], "twice")):
        options = [part for file in files for part in ("--corpus", file)]
        result = run("distill", "cartridge", folder, *options, "--tokens", 9, "--output", tmp_path / "x", *SMALL)
        assert result.exit_code != 0 and match in result.stderr


def test_verify_finds_a_path_that_is_wrong(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "whole"
    run(
        "distill",
        "cartridge",
        folder,
        "--corpus",
        corpus,
        "--template",
        "text",
        "--method",
        "whole",
        "--output",
        output,
    )
    original = parity.document.read

    def shifted(model, ids):
        segment = original(model, ids)
        return type(segment)(segment.keys, segment.values, segment.num_positions + 1)

    monkeypatch.setattr(parity.document, "read", shifted)
    result = run("artifact", "verify", output)
    assert result.exit_code == 1 and "parity: RMS ratio" in result.stderr
    assert run("artifact", "verify", output, "--files-only").exit_code == 0


def test_the_recipe_hands_its_choices_on() -> None:
    recipe = Recipe(tokens=9, conversations=7, answer_tokens=11, steps=13, learning_rate=0.5, seed=3)
    study = recipe.study(*recipe.conversations_about([100]))
    assert (study.conversations, study.answer_tokens, study.seed) == (7, 11, 3)
    assert (recipe.training.steps, recipe.training.learning_rate, recipe.training.seed) == (13, 0.5, 3)
    with pytest.raises(OptionError, match="unknown start"):
        Recipe(tokens=9, start="middle")


def test_a_foreign_file_becomes_an_artifact_that_is_read(folder: Path, tmp_path: Path) -> None:
    """The file of another project, made of this model's own keys and values: the same text comes out."""
    from transformers import LlamaForCausalLM as Model

    from accel.methods.cartridge import document

    loaded = accel.load(str(folder), method="plain")
    assert loaded.tokenizer is not None
    segment = document.read(Model.from_pretrained(folder), loaded.tokenizer(TEXT)["input_ids"])
    lists = {
        f"{part}_{kind}": torch.nn.ParameterList([each[None, :, cut] for each in tensors])
        for kind, tensors in (("keys", segment.keys), ("values", segment.values))
        for part, cut in (("frozen", slice(0, 1)), ("trainable", slice(1, None)))
    }
    source = tmp_path / "cache_last.pt"
    torch.save(lists, source)
    result = run("artifact", "convert", source, "--model", folder, "--output", tmp_path / "converted")
    assert result.exit_code == 0, result.output
    assert f"{segment.num_tokens} slots, hazy" in result.stdout
    parameters = Parameters.parse(open_artifact(tmp_path / "converted").manifest.parameters, "here")
    assert (parameters.sink_tokens, parameters.positions, parameters.method) == (1, 219, "converted:hazy")
    inside = loaded.generate(TEXT + "When?", max_new_tokens=8)
    assert loaded.generate("When?", max_new_tokens=8, cartridges=[str(tmp_path / "converted")]) == inside


def test_a_foreign_file_that_does_not_fit_is_refused_with_both_values(folder: Path, tmp_path: Path) -> None:
    cache = [(torch.randn(1, 3, 5, 16), torch.randn(1, 3, 5, 16)) for _ in range(2)]
    torch.save(cache, tmp_path / "press.pt")
    convert = ["artifact", "convert", tmp_path / "press.pt", "--model", folder, "--output", tmp_path / "x"]
    result = run(*convert, "--format", "kvpress")
    assert result.exit_code != 0 and "does not say where the prompt behind it begins" in result.stderr
    result = run(*convert, "--format", "kvpress", "--positions", 40)
    assert result.exit_code != 0 and "has kv_heads 3, the model 1" in result.stderr
    assert not (tmp_path / "x").exists()
