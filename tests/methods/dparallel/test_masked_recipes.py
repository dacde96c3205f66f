"""`accel distill a2d | dparallel | calibrate`: from a causal model to a calibrated artifact, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from byte_models import save_byte_llama
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner, Result
from transformers import BertConfig, BertForMaskedLM

import accel
from accel.artifacts import open_artifact, update, verify
from accel.cli.main import main
from accel.distill.prompts import read
from accel.distill.weights import weights_digest
from accel.errors import ArtifactError, ModelError, OptionError
from accel.methods.dparallel.artifact import facts_in, set_threshold
from accel.methods.dparallel.distill import begin
from accel.methods.dparallel.distill.recipe import Conversion, DParallel, distill, prepare
from accel.models.diffusion import facts_of
from accel.models.loading import load_model

CONVERSION = (
    "--max-new-tokens 4 --block-length 4 --longest-prompt 8 --steps 120 --batch-tokens 64 --learning-rate 5e-3 "
    "--checkpoint-every 60 --weights float32 --check final"
).split()
FORCING = "--longest-prompt 8 --max-new-tokens 4 --steps 6 --batch-tokens 64 --checkpoint-every 3".split()
FORCING += "--weights float32 --learning-rate 1e-3 --lora-rank 4 --held-out 0.3".split()
NUMBERS = range(10, 20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["distill", *map(str, arguments)])


def fine(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    """A tiny causal model with a byte tokenizer, as transformers saves them."""
    return save_byte_llama(tmp_path_factory.mktemp("causal"), max_position_embeddings=64, initializer_range=0.1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Numbers to be said again."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"text": f"{i}=", "answer": f"{i}"} for i in NUMBERS] + [{"text": "too long a prompt", "answer": "1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def base(causal, prompts, tmp_path_factory) -> Path:
    """The masked-diffusion model that a2d makes of it."""
    output = tmp_path_factory.mktemp("a2d") / "base"
    fine(run("a2d", causal, "--prompts", prompts, "--output", output, *CONVERSION))
    return output


def test_a2d_makes_an_artifact_that_decodes(base, causal):
    manifest = open_artifact(base).manifest
    assert manifest.kind == "dparallel" and all(check.ok for check in verify(base))
    model, tokenizer = load_model(causal)
    old = model.config.vocab_size
    assert manifest.parameters["facts"]["mask_token"] == old and manifest.parameters["max_new_tokens"] == 4
    assert manifest.made["teacher"]["weights_digest"] == weights_digest(model)
    assert manifest.base.vocab_size == old and manifest.made["recipe"]["name"] == "a2d"
    hidden = manifest.measured["hidden_tokens"]
    assert hidden["after"]["cross_entropy"] < 0.7 * hidden["before"]["cross_entropy"]
    # a block's tokens, one a forward, whatever stands behind the answer's end
    assert 2 <= manifest.measured["student"]["one_token"]["forwards"] <= 4
    loaded, tokenizer = load_model(base)
    assert facts_of(loaded) == facts_in(open_artifact(base)) and facts_of(loaded).stop_tokens == (0,)
    assert loaded.config.vocab_size == old + 1 and tokenizer.mask_token_id == old and tokenizer.mask_token == begin.MASK
    served = accel.load(str(base))
    said = [served.generate(f"{i}=", max_new_tokens=4) for i in NUMBERS]
    assert served.stats.method == "dparallel"
    # one of them was held out
    assert sum(text == str(i) for text, i in zip(said, NUMBERS, strict=True)) >= 6, said


def test_dparallel_learns_its_own_right_answers(base, prompts, tmp_path):
    output = tmp_path / "fast"
    result = fine(run("dparallel", base, "--prompts", prompts, "--output", output, *FORCING))
    manifest = open_artifact(output).manifest
    assert (
        all(check.ok for check in verify(output))
        and manifest.parameters["facts"] == facts_in(open_artifact(base)).as_dict()
    )
    answers = manifest.measured["answers"]
    assert answers["written"] == answers["kept"] + answers["cut"] + answers["wrong"] and answers["kept"] >= 3
    assert manifest.made["teacher"]["weights_digest"] == weights_digest(load_model(base)[0])
    assert {"teacher", "student", "hidden_tokens"} <= set(manifest.measured)
    assert manifest.measured["student"]["threshold"]["accuracy"] is not None
    assert f"answers: {answers['kept']} of {answers['written']} learned" in result.stdout and result.stderr == ""
    # weights moved, and merged additions are all that did
    before, after = (load_model(folder)[0].state_dict() for folder in (base, output))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("proj" in name for name in moved)
    assert accel.load(str(output)).generate("12=", max_new_tokens=4) is not None


def test_a_killed_run_goes_on_to_the_same_artifact(base, prompts, tmp_path):
    class Killed(Exception):
        pass

    recipe = DParallel(
        longest_prompt=8, max_new_tokens=4, steps=4, batch_tokens=64, checkpoint_every=2, lora_rank=2, check="none"
    )

    def make(name, work, stop=None):
        def watch(message):
            if stop and message.startswith(stop):
                raise Killed

        model, tokenizer = load_model(base)
        return distill(model, tokenizer, read([prompts]), recipe, tmp_path / work, tmp_path / name, watch)

    whole = make("whole", "work")
    for stop in ("training: step 3", "measuring …"):
        with pytest.raises(Killed):
            make("killed", "again", stop)
    resumed = make("killed", "again")
    assert resumed.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]
    assert resumed.manifest.made["losses"] == whole.manifest.made["losses"]
    assert not list(tmp_path.glob("again/saved*"))


def test_calibrate_writes_the_threshold_into_manifest_and_config(base, prompts, tmp_path):
    output = tmp_path / "fast"
    fine(run("dparallel", base, "--prompts", prompts, "--output", output, *FORCING))
    before = open_artifact(output)
    sweep = ("calibrate", output, "--prompts", prompts, "--longest-prompt", 8, "--thresholds", "0.25,3")
    tried = fine(run(*sweep, "--dry-run", "--budget", 100, "--plot", tmp_path / "sweep.svg"))
    # one token a forward and both thresholds, on a line
    (line,) = re.findall(r'<polyline points="([^"]*)"', (tmp_path / "sweep.svg").read_text())
    assert len(line.split()) == 3
    assert "AUP" in tried.stdout and "one token a forward" in tried.stdout
    assert open_artifact(output).manifest == before.manifest
    document = json.loads(fine(run(*sweep, "--budget", 100, "--json")).stdout)
    after = open_artifact(output)
    chosen = document["chosen"]["threshold"]
    assert document["written"] and chosen in (0.25, 3.0) and len(document["points"]) == 2
    assert facts_in(after).threshold == chosen and facts_of(load_model(output)[0]).threshold == chosen
    assert after.manifest.measured["calibration"]["aup"] == document["aup"]
    assert all(check.ok for check in verify(output))
    # the weights were not written again
    assert after.manifest.files["model.safetensors"] == before.manifest.files["model.safetensors"]
    assert not list(tmp_path.glob(".fast*"))


def test_manifest_and_config_must_agree(base, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(base, folder)
    changed = set_threshold(open_artifact(folder), 0.125, {}, {})
    assert facts_in(changed).threshold == 0.125
    # a manifest with a right digest of a config that says something else
    config = json.loads((folder / "config.json").read_text())
    config["accel_diffusion"]["mask_token"] = 5
    other = update(changed, changed.manifest, {"config.json": json.dumps(config)})
    with pytest.raises(ArtifactError, match=r"mask_token is 257 in the manifest and 5 in config.json"):
        facts_in(other)


def test_the_plan_writes_nothing(causal, base, prompts, tmp_path):
    plan = json.loads(fine(run("a2d", causal, "--prompts", prompts, "--plan", "--json", *CONVERSION)).stdout)
    assert (plan["prompts"], plan["held_out"], plan["too_long"]) == (9, 1, 1)
    assert plan["disk"]["total"] == sum(value for name, value in plan["disk"].items() if name != "total")
    assert plan["trained"] == plan["parameters"] and plan["facts"]["mask_token"] == 257
    text = fine(run("dparallel", base, "--prompts", prompts, "--plan", *FORCING)).stdout
    assert "disk: at most" in text and "blocks of 4, entropy at 0.5" in text
    assert not list(tmp_path.iterdir())


def test_a_mask_token_is_named_or_new(causal):
    model, tokenizer = load_model(causal)
    assert begin.mask_id(tokenizer, "A") == tokenizer.get_vocab()["A"]
    before = model(torch.tensor([[5, 6]])).logits
    begin.add_mask_token(model, tokenizer, begin.mask_id(tokenizer, "A"), "A")
    assert model.config.vocab_size == 257 and tokenizer.mask_token == "A"
    begin.add_mask_token(model, tokenizer, 257, "<|open|>")
    table = model.get_input_embeddings().weight
    assert len(table) == 258 and torch.allclose(table[257], table[:257].mean(0))
    assert torch.equal(model(torch.tensor([[5, 6]])).logits[..., :257], before)


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("a2d", [], "no --output"),
        ("a2d", ["--output", "{tmp}"], "exists already: choose another folder"),
        ("a2d", ["--plan", "--data", "web"], "unknown data 'web'"),
        ("a2d", ["--plan", "--noise", "white"], "unknown noise 'white'"),
        ("a2d", ["--plan", "--max-disk", "1MB"], "max_bytes=1000000: answers take up to 0, checkpoints"),
        (
            "a2d",
            ["--plan", "--max-new-tokens", "64"],
            "behind a prompt of 3 tokens that is 67 positions, the model has 64",
        ),
        ("a2d", ["--plan", "--batch-tokens", "8"], "batch_tokens=8: a prompt of 3 tokens, 32 positions"),
        ("a2d", ["--plan", "--lora-targets", "q_proj"], "lora_rank=0 trains all weights"),
        ("a2d", ["--plan", "--lora-rank", "2", "--lora-targets", "attn_out"], "'attn_out' names no linear layer"),
        ("a2d", ["--plan", "--mask-token", "</s>"], "it is a stop token too"),
        ("a2d", ["--plan", "--rule", "sure"], "unknown rule 'sure'"),
        ("dparallel", ["--plan"], "no masked-diffusion model"),
        ("calibrate", [], "it has no accel.json"),
        ("calibrate", ["--thresholds", "low"], "--thresholds 'low': give numbers"),
    ],
)
def test_mistakes_are_one_line(causal, prompts, tmp_path, command, given, says):
    given = [each.replace("{tmp}", str(tmp_path)) for each in given]
    small = [] if command == "calibrate" or "--max-new-tokens" in given else ["--max-new-tokens", "4"]
    result = run(command, causal, "--prompts", prompts, "--longest-prompt", 8, *small, *given)
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert result.stderr.startswith("Error: ") and says in result.stderr and result.stderr.count("\n") == 1


def test_what_does_not_fit_together_is_refused(causal, base, prompts, tmp_path):
    model, tokenizer = load_model(base)
    rows = read([prompts])
    small = {"longest_prompt": 8, "max_new_tokens": 4}
    with pytest.raises(ModelError, match="is a masked-diffusion model already"):
        prepare(model, tokenizer, rows, Conversion(**small))
    (unanswered := tmp_path / "asked.jsonl").write_text('{"text": "1="}\n{"text": "2="}\n')
    with pytest.raises(OptionError, match="have no answer to compare with: add answers, or keep all"):
        prepare(model, tokenizer, read([unanswered]), DParallel(**small))
    assert prepare(model, tokenizer, read([unanswered]), DParallel(check="none", **small)).known is None
    with pytest.raises(OptionError, match="1 of 1 prompts have no answer in the file"):
        prepare(*load_model(causal), read([unanswered]), Conversion(**small))
    # nothing right, nothing to learn
    (hard := tmp_path / "hard.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}=", "answer": "777"}) + "\n" for i in NUMBERS)
    )
    with pytest.raises(OptionError, match="none of 9 answers is worth learning"):
        distill(model, tokenizer, read([hard]), DParallel(**small), tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_masked_lm_class_stays_what_it_is(prompts, tmp_path):
    """Bert with facts in its config: no causal class, no rotation, its own positions."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "pad_token": "[PAD]"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        accel_diffusion={"mask_token": tokenizer.mask_token_id, "stop_tokens": [0], "block_length": 4},
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model, tokenizer = load_model(tmp_path / "bert")
    recipe = DParallel(data="file", longest_prompt=8, max_new_tokens=4, steps=2, batch_tokens=64, lora_rank=0)
    made = distill(model, tokenizer, read([prompts]), recipe, tmp_path / "work", tmp_path / "out")
    loaded, _ = load_model(made.path)
    assert isinstance(loaded, BertForMaskedLM) and facts_of(loaded) == facts_in(made)
    assert len(accel.load(str(made.path)).generate("12=", max_new_tokens=4)) > 0


def test_a2d_learns_what_the_causal_model_says(causal, prompts, tmp_path):
    """data="self": answers that the causal model wrote from left to right; those without an end are left out."""
    model, tokenizer = load_model(causal)
    with torch.no_grad():  # a model that ends after a token or two
        model.lm_head.weight.zero_()
        model.lm_head.weight[0] = 1e-3 * model.model.norm.weight
    recipe = Conversion(
        data="self", longest_prompt=8, max_new_tokens=4, block_length=4, steps=2, batch_tokens=64, canvas="whole"
    )
    made = distill(model, tokenizer, read([prompts]), recipe, tmp_path / "work", tmp_path / "out")
    assert made.manifest.measured["answers"]["written"] == 9
    assert (tmp_path / "work" / "answers" / "cache.json").is_file()
