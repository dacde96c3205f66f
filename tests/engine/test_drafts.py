"""From what a user hands over to a drafter: artifacts on disk, transformers folders, live objects, refusals."""

from __future__ import annotations

import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from diffusion_models import LLADA, LLADA_FACTS, VOCAB, llada_tensors, write_checkpoint

import accel
from accel.artifacts import Manifest, describe_base, save
from accel.engine.drafts import drafter_from
from accel.errors import ArtifactError, IncompatibleError
from accel.methods.dparallel.artifact import write
from accel.models.diffusion import CONFIG_KEY, DiffusionFacts

KEPT = list(range(2, 67, 2))  # the target ids that the trimmed draft knows


@pytest.fixture
def target(tiny):
    return tiny.build("llama")


def draft_artifact(tiny, folder, target, *, kind="draft", lose=(), extra=(), trimmed=False):
    draft = tiny.build("llama", seed=1, vocab_size=len(KEPT)) if trimmed else tiny.draft_of(target, "partly")
    weights = {name: tensor.contiguous() for name, tensor in draft.state_dict().items() if name not in lose}
    weights |= {name: torch.zeros(1) for name in extra}
    files = {"model.safetensors": weights}
    parameters = {"config": draft.config.to_diff_dict()}
    if trimmed:
        files["vocabulary.safetensors"] = {"d2t": torch.tensor(KEPT)}
        parameters["unknown"] = 0
    base = describe_base(target.config, name="tiny")
    return save(folder, Manifest(kind=kind, base=base, parameters=parameters), files)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("as_path", [False, True])
def test_a_draft_artifact_drafts(tiny, tmp_path, target, trimmed, as_path):
    artifact = draft_artifact(tiny, tmp_path / "draft", target, trimmed=trimmed)
    prompt = tiny.prompts(2) | {"max_new_tokens": 12}
    given = str(artifact.path) if as_path else artifact
    out = accel.generate(target, artifacts=[given], drafter="lm", draft_length=3, **prompt)
    tiny.assert_similar(out, tiny.reference(target, **prompt))
    assert accel.stats(target).drafted_tokens > 0


def test_a_transformers_folder_is_a_draft(tiny, tmp_path, target):
    tiny.draft_of(target, "right").save_pretrained(tmp_path / "small")
    prompt = tiny.prompts(1) | {"max_new_tokens": 12}
    accel.generate(target, artifacts=[tmp_path / "small"], drafter="lm", draft_length=3, **prompt)
    assert accel.stats(target).acceptance_rate > 0.8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lose": ["model.norm.weight"]}, r"missing \['model.norm.weight'\]"),
        ({"extra": ["surplus"]}, r"unknown \['surplus'\]"),
        ({"kind": "model"}, "takes kind 'draft'"),
        ({"kind": "demos"}, "which nothing decodes with: pass it to accel.cascade"),
    ],
)
def test_a_draft_artifact_that_does_not_fit_is_refused(tiny, tmp_path, target, change, says):
    artifact = draft_artifact(tiny, tmp_path / "draft", target, **change)
    with pytest.raises(ArtifactError, match=says):
        accel.attach(target, artifact)


def test_a_draft_made_for_another_model_is_refused(tiny, tmp_path, target):
    artifact = draft_artifact(tiny, tmp_path / "draft", target)
    with pytest.raises(ArtifactError):
        accel.attach(tiny.build("llama", num_hidden_layers=3), artifact)


def test_a_draft_head_takes_no_tokenizer_of_its_own(tmp_path, target):
    (tmp_path / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    with pytest.raises(IncompatibleError, match=r"draft_tokenizer= with the draft head .* leave it out"):
        accel.attach(target, tmp_path, tokenizer=object(), draft_tokenizer=object())


def test_what_is_no_draft_is_refused(target):
    with pytest.raises(ArtifactError, match="int is no artifact"):
        accel.attach(target, 7)
    with pytest.raises(IncompatibleError, match="the target itself"):
        accel.attach(target, target)


@pytest.fixture
def masked_artifact(tmp_path):
    """A masked-diffusion model of bytes, as ``accel distill a2d`` saves it."""
    model, tokenizer = byte_llama(max_position_embeddings=64), byte_tokenizer()
    return write(
        tmp_path / "masked",
        model,
        tokenizer,
        DiffusionFacts(mask_token=256, block_length=4, stop_tokens=(0,)),
        work=tmp_path / "work",
        base=describe_base(model.config, tokenizer, name="tiny"),
        dtype="float32",
        parameters={},
        made={},
        measured={},
    )


@pytest.mark.parametrize("as_path", [False, True])
def test_a_masked_diffusion_artifact_drafts(tiny, masked_artifact, as_path):
    """For any model with its tokenizer, whatever model it was made from."""
    target = tiny.build("qwen2", vocab_size=257)
    given = masked_artifact.path if as_path else masked_artifact
    prompt = tiny.prompts(2) | {"max_new_tokens": 12}
    accel.attach(target, given, tokenizer=byte_tokenizer(), drafter="lm", draft_length=3)
    tiny.assert_similar(target.generate(**prompt), tiny.reference(target, **prompt))
    assert accel.stats(target).drafted_tokens > 0


def test_a_masked_diffusion_artifact_that_does_not_fit_is_refused(tiny, masked_artifact, target):
    with pytest.raises(IncompatibleError, match="a vocabulary of 257 and the target of 67"):
        accel.attach(target, masked_artifact)
    target = tiny.build("qwen2", vocab_size=257)
    other = byte_tokenizer()
    other.add_tokens(["more"])
    accel.attach(target, masked_artifact, tokenizer=other)
    weights = masked_artifact.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model.safetensors: sha256 is"):
        accel.attach(target, masked_artifact)


def test_a_published_masked_diffusion_folder_drafts(tiny, tmp_path):
    folder = write_checkpoint(tmp_path, LLADA | {CONFIG_KEY: LLADA_FACTS}, llada_tensors())
    drafter = drafter_from(folder, tiny.build("llama", vocab_size=VOCAB))
    assert drafter.name == "masked" and drafter.reader.facts.block_length == LLADA_FACTS["block_length"]
