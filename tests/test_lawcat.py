"""A LAWCAT conversion from attach to detach: our generate(), transformers' own, drafts, artifacts, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner
from linear_models import naive_logits, random_tensors

import accel
from accel.artifacts import open_artifact, verify
from accel.cli.main import main
from accel.errors import AccelError, ArtifactError, IncompatibleError, OptionError
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.lawcat.artifact import Lawcat
from accel.models.linear import LinearSpec, LowRank, is_linear, linear_layers
from accel.models.row_cache import Segment

NEW = 12
KINDS = {
    "linear": {},
    "hybrid": {"layers": (1,)},
    "window": {"window": 4},
    "shared": {"share_conv": True, "tie_maps": True, "gate_rank": None},
}


def lawcat(model, low_rank=None, name="a-lawcat", **spec):
    heads = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    settings = {"layers": tuple(range(model.config.num_hidden_layers)), "feature_size": heads // 2, "gate_rank": 3}
    chosen = LinearSpec(**settings | spec)
    return Lawcat.of(name, chosen, random_tensors(model.config, chosen, low_rank), model, low_rank=low_rank)


def greedy(model, prompt, new):
    """The greedy continuation by the equation, whole text again for every token."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(naive_logits(model, text)[-1].argmax()))
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_plain_generation_is_the_equation(tiny, kind):
    model = tiny.build("llama")
    accel.attach(model, lawcat(model, **KINDS[kind]), method="plain")
    model.generation_config.eos_token_id = None
    prompt = torch.arange(5, 14)[None]
    got = model.generate(prompt, max_new_tokens=NEW)
    assert got[0].tolist() == greedy(model, prompt[0].tolist(), NEW)
    stats = accel.stats(model)
    assert not stats.lossless and stats.state_bytes > 0
    assert any("not the softmax model's own" in note for note in stats.notes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_padded_batch_is_transformers_own(tiny, family, kind):
    """Left-padded rows, ours against transformers' generate() on the attached model, and against each row alone."""
    model = tiny.build(family)
    accel.attach(model, lawcat(model, **KINDS[kind]), method="plain")
    inputs = tiny.prompts(4) | {"max_new_tokens": NEW}
    ours = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    tiny.assert_similar(ours.sequences, tiny.reference(model, **inputs), ours.scores)
    assert accel.stats(model).method == "plain"
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row][mask][None], max_new_tokens=NEW)[0]
        assert torch.equal(ours.sequences[row][-NEW:][: len(alone) - int(mask.sum())], alone[int(mask.sum()) :])


@pytest.mark.parametrize("kind", ["linear", "hybrid", "window"])
@pytest.mark.parametrize("drafts", ["right", "partly", "wrong", "ngram"])
def test_drafts_change_nothing(tiny, kind, drafts):
    model = tiny.build("llama")
    made = lawcat(model, **KINDS[kind])
    accel.attach(model, made, method="plain")
    inputs = tiny.prompts(3) | {"max_new_tokens": 2 * NEW}
    plain = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    draft = () if drafts == "ngram" else (tiny.draft_of(accel.detach(model), drafts),)
    accel.attach(model, made, *draft, draft_length=4, **({"drafter": "ngram"} if drafts == "ngram" else {}))
    tiny.assert_similar(model.generate(**inputs), plain)
    stats = accel.stats(model)
    assert stats.drafted_tokens > 0 and not stats.lossless


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_a_conversion_may_draft_for_its_own_teacher(tiny, kind):
    model = tiny.build("llama")
    inputs = tiny.prompts(3) | {"max_new_tokens": 2 * NEW}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = tiny.reference(model, **inputs)
    accel.attach(model, lawcat(model, **KINDS[kind]), lawcat="draft", draft_length=3)
    assert not is_linear(model)
    tiny.assert_similar(model.generate(**inputs), expected)
    stats = accel.stats(model)
    assert stats.drafted_tokens > 0 and stats.lossless
    draft = model.__dict__["_accel_attached"].draft.model
    assert is_linear(draft) and draft.lm_head.weight is model.lm_head.weight
    accel.detach(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_sampling_and_copies_of_a_prompt_share_one_prefill(tiny):
    model = tiny.build("llama")
    accel.attach(model, lawcat(model), method="plain", seed=3)
    inputs = tiny.prompts(1) | {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    first = model.generate(**inputs)
    assert torch.equal(first, model.generate(**inputs))
    assert len({tuple(row.tolist()) for row in first}) > 1


@pytest.mark.parametrize("kind", ["linear", "hybrid", "window"])
def test_beams_are_transformers_own_on_our_layers(tiny, kind):
    model = tiny.build("llama")
    accel.attach(model, lawcat(model, **KINDS[kind]))
    inputs = tiny.prompts(3) | {"max_new_tokens": 6, "num_beams": 3}
    got = model.generate(**inputs)
    assert accel.stats(model).method == "transformers"
    # without a cache every step reads the whole text again: nothing can be reordered wrongly
    assert torch.equal(got, type(model).generate(model, **inputs, use_cache=False))


@pytest.mark.parametrize("low_rank", [None, LowRank(2, 4.0)], ids=["as it is", "lora"])
def test_detach_gives_the_model_back_bit_for_bit(tiny, low_rank):
    model = tiny.build("llama")

    def snapshot():
        with torch.no_grad():
            logits = model(torch.arange(3, 33).view(2, 15)).logits
        modules = {name: (type(m), [(k, id(v)) for k, v in m._modules.items()]) for name, m in model.named_modules()}
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        weights = {name: (w.data_ptr(), w.numpy().tobytes()) for name, w in model.state_dict().items()}
        return logits.numpy().tobytes(), modules, hooks, weights, sorted(model.__dict__)

    before = snapshot()
    accel.attach(model, lawcat(model, low_rank), method="plain")
    assert is_linear(model) and snapshot() != before
    model.generate(torch.arange(5, 9)[None], max_new_tokens=4)
    accel.attach(model, lawcat(model, low_rank, layers=(0,)), method="plain")
    assert len(linear_layers(model)) == 1
    with pytest.raises(AccelError):
        accel.attach(model, method="speculative", draft_length=0)
    assert len(linear_layers(model)) == 1
    accel.generate(model, torch.arange(5, 9)[None], max_new_tokens=2, method="plain")
    assert len(linear_layers(model)) == 1
    accel.detach(model)
    assert snapshot() == before


def test_a_copy_of_an_attached_model_is_attached_too(tiny):
    model = tiny.build("llama")
    accel.attach(model, lawcat(model), method="plain")
    prompt = torch.arange(5, 14)[None]
    expected = model.generate(prompt, max_new_tokens=NEW)
    other = copy.deepcopy(model)
    accel.detach(model)
    assert torch.equal(other.generate(prompt, max_new_tokens=NEW), expected)
    assert not is_linear(accel.detach(other)) and not is_linear(model)


def test_lora_is_added_to_the_projections(tiny):
    """W + alpha / r · B A, so that a model with these weights and no LoRA says the same."""
    model = tiny.build("llama")
    low_rank = LowRank(2, 6.0)
    made = lawcat(model, low_rank)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(plain.model.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                a, b = (made.tensors[f"layers.{index}.{name}.lora_{half}"] for half in "AB")
                getattr(layer.self_attn, name).weight += 3.0 * b @ a
    own = {name: tensor for name, tensor in made.tensors.items() if ".lora_" not in name}
    accel.attach(model, made, method="plain")
    accel.attach(plain, Lawcat.of("b", made.spec, own, plain), method="plain")
    ids = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("low_rank", [None, LowRank(2, 4.0)], ids=["as it is", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_read_as_it_was_written(tiny, tmp_path, kind, low_rank):
    model = tiny.build("llama")
    made = lawcat(model, low_rank, **KINDS[kind])
    written = made.save(tmp_path / "a-lawcat", measured={"passkey": 0.5})
    assert all(check.ok for check in verify(written))
    read = Lawcat.load(open_artifact(written.path), model)
    assert (read.spec, read.low_rank, read.measured) == (made.spec, made.low_rank, {"passkey": 0.5})
    assert {n: t.numpy().tobytes() for n, t in read.tensors.items()} == {
        n: t.numpy().tobytes() for n, t in made.tensors.items()
    }
    prompt = torch.arange(5, 14)[None]
    accel.attach(model, made, method="plain")
    expected = model.generate(prompt, max_new_tokens=NEW)
    accel.detach(model)
    accel.attach(model, str(written.path), method="plain")
    assert torch.equal(model.generate(prompt, max_new_tokens=NEW), expected)


def test_the_command_line_reads_one(tiny, tmp_path):
    model = tiny.build("llama", vocab_size=257)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    lawcat(model).save(tmp_path / "converted")
    arguments = ["generate", "-m", str(tmp_path / "base"), "-a", str(tmp_path / "converted"), "--raw", "--json"]
    said = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "6", "some text"])
    assert said.exit_code == 0, said.output
    stats = json.loads(said.stdout)["stats"]
    assert not stats["lossless"] and stats["state_bytes"] > 0
    assert "linear attention of converted: not the softmax model's own distribution" in stats["notes"]
    drafting = CliRunner().invoke(main, [*arguments, "-o", "lawcat=draft", "--max-new-tokens", "6", "some text"])
    assert drafting.exit_code == 0 and json.loads(drafting.stdout)["stats"]["lossless"]


def test_a_cartridge_beside_linear_layers_is_refused(tiny):
    model = tiny.build("llama")
    keys = tuple(torch.zeros(2, 3, 8) for _ in range(2))
    cartridge = Cartridge.of("a-cartridge", Segment(keys, keys, 3), model, method="test")
    made = lawcat(model)
    with pytest.raises(IncompatibleError, match="a cartridge with the linear attention of a-lawcat"):
        accel.attach(model, made, cartridge)
    accel.attach(model, made)
    with pytest.raises(IncompatibleError, match="a cartridge with the linear attention of a-lawcat"):
        model.generate(torch.arange(5, 9)[None], max_new_tokens=2, cartridges=[cartridge])


def test_what_does_not_fit_is_refused(tiny, tmp_path):
    model, other = tiny.build("llama"), tiny.build("llama", num_hidden_layers=3)
    made = lawcat(model)
    path = made.save(tmp_path / "a-lawcat").path
    with pytest.raises(ArtifactError, match="config digest"):
        accel.attach(other, str(path))
    with pytest.raises(IncompatibleError, match="layer 2 of a model that has 2"):
        lawcat(model, layers=(0, 2))
    with pytest.raises(IncompatibleError, match=r"feature_size 3 .* use 4"):
        lawcat(model, feature_size=3)
    with pytest.raises(IncompatibleError, match="is a gpt2"):
        LinearSpec((0,), 4).check_fits(tiny.build("gpt2").config)
    with pytest.raises(IncompatibleError, match="2 lawcat artifacts"):
        accel.attach(model, made, made)
    with pytest.raises(OptionError, match="without a lawcat artifact"):
        accel.attach(model, lawcat="draft")
    with pytest.raises(OptionError, match="lawcat='both'"):
        accel.attach(model, made, lawcat="both")
    with pytest.raises(OptionError, match="target axis"):
        accel.attach(model, made, method="lawcat")
    with pytest.raises(ArtifactError, match="missing"):
        Lawcat.of("x", made.spec, {}, model)
    with pytest.raises(ArtifactError, match="NaN"):
        Lawcat.of("x", made.spec, {name: t * float("nan") for name, t in made.tensors.items()}, model)
    accel.attach(model, made)
    with pytest.raises(IncompatibleError, match="one of 4 dimensions"), torch.no_grad():
        model(torch.arange(4)[None], attention_mask=torch.ones(1, 1, 4, 4))
    assert not is_linear(accel.detach(model))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": (1, 0)}, "layers"),
        ({"layers": (0, 0)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"feature_size": 0}, "feature_size"),
        ({"conv_width": 3}, "conv_width"),
        ({"window": -1}, "window"),
        ({"window": 2, "normalised": False}, "normalised"),
        ({"gate_rank": -1}, "gate_rank"),
        ({"gate_normalizer": 0}, "gate_normalizer"),
        ({"min_log_decay": 0.5}, "min_log_decay"),
        ({"activation": "relu"}, "activation"),
        ({"activation": "silu", "conv_width": 0}, "activation"),
        ({"rope": True}, "rope"),
        ({"unknown": 1}, "unknown"),
        ({"window": 2.0}, "window"),
        ({"normalised": 1}, "normalised"),
    ],
)
def test_a_manifest_with_a_wrong_spec_is_refused(wrong, words):
    good = LinearSpec((0, 1), 4).as_dict()
    assert LinearSpec.parse(json.loads(json.dumps(good)), "here") == LinearSpec((0, 1), 4)
    with pytest.raises(ArtifactError, match=f"here: .*{words}"):
        LinearSpec.parse(good | wrong, "here")
