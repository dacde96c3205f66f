"""A draft artifact made from prompts in seconds: it loads, drafts, resumes, and says what is wrong in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import accel
from accel.artifacts import open_artifact, verify
from accel.distill.cache import INDEX
from accel.distill.lessons import Library
from accel.distill.prompts import Prompt
from accel.errors import ArtifactError, OptionError
from accel.methods.speculative.distill.plan import HELD_OUT, prepare
from accel.methods.speculative.distill.recipe import Recipe, distill_draft

SMALL = Recipe(
    shape="1x32",
    vocabulary=40,
    max_new_tokens=12,
    longest_prompt=20,
    k=8,
    steps=6,
    batch_tokens=128,
    checkpoint_every=2,
    held_out=0.2,
    max_bytes=9_000_000,
)


class Letters:
    """A tokenizer of single letters: as much of transformers' as is used."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 60 for letter in text]}

    def get_vocab(self):
        return {chr(i): i for i in range(67)}


PROMPTS = [Prompt(text=f"prompt {i:02d}", answer=f"answer {i}" if i % 2 else None) for i in range(24)]


@pytest.fixture
def target(tiny):
    return tiny.build("llama")


def make(target, tmp_path, recipe=SMALL, **kwargs):
    return distill_draft(target, Letters(), PROMPTS, recipe, tmp_path / "work", tmp_path / "draft", **kwargs)


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shape": None, "layers": (1,), "vocabulary": 67, "dtype": "float32"},
        {"data": "fixed"},
        {"data": "target>draft", "keep": 0.5},
        {"data": "draft", "temperature": 0.0},
        {"data": "target@0,target@1>draft@0.5"},
        {"baseline": True},
        {"lags": 2},
        {"lags": 1, "shape": None, "layers": (0,)},
        {"lags": 2, "copying": 0.5, "shape": "1x64x2x2x64"},
    ],
    ids=str,
)
def test_a_draft_is_made_and_drafts(tiny, target, tmp_path, changes):
    recipe = dataclasses.replace(SMALL, **changes)
    said = []
    artifact = make(target, tmp_path, recipe, progress=said.append, name="tiny", command="as tested")
    assert all(check.ok for check in verify(artifact))
    manifest = artifact.manifest
    assert manifest.kind == "draft" and manifest.base.name == "tiny" and manifest.made["command"] == "as tested"
    assert len(manifest.made["losses"]) == recipe.steps
    weights = artifact.tensors("model.safetensors")
    assert {str(each.dtype).removeprefix("torch.") for each in weights.values()} == {recipe.dtype}
    for kind in ("greedy", "sampled"):
        found = manifest.measured[kind]
        assert 0 <= found["acceptance"] <= manifest.measured["coverage"] + 0.05 and 0 <= found["top1"] <= 1
        assert set(found["block_efficiency"]) == {"1", "3", "5", "7"}
    lagged = [name for name in weights if name.endswith("lag_weight")]
    assert len(lagged) == (recipe.lags > 0) and all(weights[name].abs().sum() > 0 for name in lagged)
    trimmed = recipe.vocabulary < tiny.VOCAB
    assert ("vocabulary.safetensors" in manifest.files) == trimmed == (manifest.measured["coverage"] < 1)
    prompt = tiny.prompts(2) | {"max_new_tokens": 8}
    out = accel.generate(target, artifacts=[artifact], drafter="lm", draft_length=3, **prompt)
    tiny.assert_similar(out, tiny.reference(target, **prompt))
    assert accel.stats(target).drafted_tokens > 0
    assert prepare(target, Letters(), PROMPTS, recipe).disk.total >= folder_bytes(tmp_path)
    assert "MiB on disk" in said[0] and any(line.startswith("training: step 6 of 6") for line in said)


def test_a_draft_is_trained_on(target, tmp_path):
    first = make(target, tmp_path / "first", dataclasses.replace(SMALL, lags=1, dtype="float32"))
    # nothing is learned at such a rate: what comes out is what was begun with, and room for one more lag
    usual = Recipe()
    still = dataclasses.replace(
        SMALL, shape=None, vocabulary=usual.vocabulary, lags=2, learning_rate=1e-30, dtype="float32"
    )
    second = make(target, tmp_path / "second", still, begun=first)
    assert second.manifest.made["begun"] == {"sha256": first.manifest.files["model.safetensors"].sha256}
    assert second.manifest.parameters["config"]["embedding_lags"] == 2
    assert second.manifest.parameters["unknown"] == first.manifest.parameters["unknown"]
    before, after = (each.tensors("model.safetensors") for each in (first, second))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name.endswith("lag_weight"):
            assert after[name].shape[0] == 2 and after[name][1].abs().max() < 1e-20
        torch.testing.assert_close(after[name][: len(weight)], weight)
    tables = [each.tensors("vocabulary.safetensors")["d2t"] for each in (first, second)]
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocabulary": 40}, "vocabulary=40: the draft to begin with has its own"),
        ({"shape": "1x32"}, "shape='1x32': the draft to begin with has its own"),
        ({"lags": 0}, "lags=0: draft looks back 1 tokens already, give 1 or more"),
    ],
)
def test_what_a_draft_to_begin_with_has_is_not_asked_for(target, tmp_path, changes, says):
    first = make(target, tmp_path / "first", dataclasses.replace(SMALL, lags=1))
    usual = dataclasses.replace(SMALL, shape=None, vocabulary=Recipe().vocabulary, lags=1)
    with pytest.raises(OptionError, match=says):
        make(target, tmp_path / "second", dataclasses.replace(usual, **changes), begun=first)


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", ["held-out-sampled", "target", "training: step 5"])
def test_a_killed_call_resumes_to_the_same_draft(target, tmp_path, where):
    recipe = dataclasses.replace(SMALL, shape="1x64x2x2x64", lags=2, copying=0.5, max_bytes=20_000_000)
    whole = make(target, tmp_path / "whole", recipe)

    def kill(message):
        if message.startswith(where):
            raise Killed

    with pytest.raises(Killed):
        make(target, tmp_path / "killed", recipe, progress=kill)
    resumed = make(target, tmp_path / "killed", recipe)
    assert resumed.manifest.made["losses"] == whole.manifest.made["losses"]
    assert resumed.manifest.files == whole.manifest.files  # digests of the weights among them
    assert resumed.manifest.measured == whole.manifest.measured


def test_disk_is_bounded(target, tmp_path):
    """A little less than the answers want: some are left out, and that is said."""
    recipe = dataclasses.replace(SMALL, max_new_tokens=64, batch_tokens=256)
    disk = prepare(target, Letters(), PROMPTS, recipe).disk
    recipe = dataclasses.replace(recipe, max_bytes=disk.wanted - disk.lessons["target"] * 3 // 4)
    said = []
    artifact = make(target, tmp_path, recipe, progress=said.append)
    wanted = len(prepare(target, Letters(), PROMPTS, recipe).kept.prompts)
    assert 0 < artifact.manifest.made["lessons"]["target"] < wanted
    assert any(f"of {wanted} answers" in line and "target: full after" in line for line in said)
    assert folder_bytes(tmp_path) <= recipe.max_bytes
    again = distill_draft(target, Letters(), PROMPTS, recipe, tmp_path / "work", tmp_path / "again")
    assert again.manifest.files == artifact.manifest.files
    with pytest.raises(OptionError, match="leaves nothing to learn from"):
        make(target, tmp_path / "less", dataclasses.replace(recipe, max_bytes=1000))


def test_sources_write_at_their_own_temperatures(target, tmp_path):
    sources = ("target@0", "target@1", "target")
    make(target, tmp_path, dataclasses.replace(SMALL, data=",".join(sources)))
    caches = [tmp_path / "work" / source for source in sources]
    described = [json.loads((cache / INDEX).read_text())["description"]["temperature"] for cache in caches]
    assert described == [0.0, 1.0, 1.0]  # the recipe's own is 1
    greedy, sampled, own = ([shard.read_bytes() for shard in sorted(cache.glob("*.safetensors"))] for cache in caches)
    assert greedy != sampled == own  # an answer depends on the prompt, the seed and the index alone


def test_held_out_prompts_are_not_learned_from(target, tmp_path):
    make(target, tmp_path)
    prepared = prepare(target, Letters(), PROMPTS, SMALL)
    learned = {tuple(prompt) for prompt in prepared.kept.prompts}
    assert not learned & {tuple(prompt) for prompt in prepared.held_out.prompts}
    assert len(prepared.held_out.prompts) >= 1
    assert all(prepared.folders[name] is prepared.held_out for name in HELD_OUT)


def test_another_recipe_does_not_go_on_from_the_old_one(target, tmp_path):
    make(target, tmp_path)
    again = tmp_path / "again"
    with pytest.raises(ArtifactError, match="loss='lk', this run has 'fkl'"):
        distill_draft(target, Letters(), PROMPTS, dataclasses.replace(SMALL, loss="fkl"), tmp_path / "work", again)
    with pytest.raises(ArtifactError, match=r"temperature=1\.0, this run has 0\.5"):
        distill_draft(target, Letters(), PROMPTS, dataclasses.replace(SMALL, temperature=0.5), tmp_path / "work", again)
    assert not again.exists()


def test_an_output_that_exists_is_refused_before_any_work(target, tmp_path):
    (tmp_path / "draft").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        make(target, tmp_path)
    assert not (tmp_path / "work").exists()


def test_answers_of_the_file_are_needed_for_fixed_data(target, tmp_path):
    bare = [Prompt(text=each.text) for each in PROMPTS]
    with pytest.raises(OptionError, match=r"none of the .* prompts has an answer"):
        prepare(target, Letters(), bare, dataclasses.replace(SMALL, data="fixed"))


def test_a_context_that_is_too_short_is_refused(tiny):
    with pytest.raises(OptionError, match="the model has 256 positions for both"):
        prepare(
            tiny.build("llama"), Letters(), PROMPTS, dataclasses.replace(SMALL, longest_prompt=300, batch_tokens=999)
        )


def test_the_file_s_answers_are_judged_as_they_are(tiny, target, tmp_path):
    prepared = prepare(target, Letters(), PROMPTS, dataclasses.replace(SMALL, data="fixed"))
    asked = prepared.folders["fixed"]
    library = Library(target, tmp_path, {"fixed": 10**6}, {}, lambda message: None)
    lessons = library.judged("fixed", asked, SMALL.generation(0.0))
    assert len(lessons) == len(asked.prompts)
    for lesson in lessons:
        answer = asked.answers[lesson.index][: SMALL.max_new_tokens]
        assert lesson.answer.tolist() == answer and lesson.answer[-1] == 2
        with torch.no_grad():
            logits = target(torch.tensor([[*asked.prompts[lesson.index], *answer]])).logits[0]
        expected = logits[len(asked.prompts[lesson.index]) - 1 : -1].log_softmax(-1).topk(SMALL.k)
        assert torch.equal(lesson.ids.long(), expected.indices)
        torch.testing.assert_close(lesson.logp.float(), expected.values, atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss": "l2"}, "unknown loss 'l2'"),
        ({"data": "web"}, "unknown data source 'web': choose from draft, fixed, target"),
        ({"shape": "1x32", "layers": (0,)}, "give one of the two"),
        ({"shape": "wide"}, "shape 'wide'"),
        ({"vocabulary": 0}, "vocabulary=0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"start": "zero"}, "unknown start 'zero'"),
        ({"batch_tokens": 10}, "must hold one lesson"),
        ({"held_out": 0.9}, "held_out=0.9"),
        ({"k": 0}, "k=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"copying": -1.0, "lags": 1}, "copying=-1.0"),
        ({"copying": 0.5}, "copying=0.5 with lags=0"),
        ({"lags": 9}, "lags=9: tokens to look back at are a whole number from 0 to 8"),
    ],
)
def test_bad_recipes_are_one_line(given, says):
    with pytest.raises(OptionError, match=says) as caught:
        Recipe(**given)
    assert "\n" not in str(caught.value)


def test_an_opened_artifact_is_what_was_returned(target, tmp_path):
    artifact = make(target, tmp_path)
    assert open_artifact(tmp_path / "draft").manifest == artifact.manifest
