"""EAGLE-3 heads as folders: what generate() makes of them, and one sentence for each that cannot be used."""

from __future__ import annotations

import json

import eagle3_heads as heads
import pytest
import torch
from safetensors.torch import load_file, save_file

import accel
from accel.drafters.eagle3 import is_head, load_head
from accel.errors import ArtifactError, IncompatibleError

KEPT = [2, *range(5, 67, 2)]


@pytest.fixture
def target(tiny):
    return tiny.build("llama", num_hidden_layers=4)


@pytest.fixture
def folder(target, tmp_path):
    head = heads.random_head(target, (1, 2, 4), KEPT)
    return heads.write(head, tmp_path / "head", target, "speculators")


def knowing(target, kept):
    """A head that knows what a target without attention says next: its own attention is on the pair's token alone.

    Needs a layer with a window of one token, and a target whose next token depends on its last one only.
    """
    head = heads.random_head(target, (0, 1, 2), kept, layer="qwen3", norm_before_residual=True)
    size, w = target.config.hidden_size, head.weights
    # no residual, whatever the feature is
    w["layers.0.hidden_norm.weight"].zero_()
    w["layers.0.mlp.down_proj.weight"].zero_()
    for name in ("layers.0.input_layernorm.weight", "norm.weight"):
        w[name].fill_(1)
    # two key-value heads of six each carry half of the embedding, and each is read by two heads
    half = torch.eye(heads.KV_HEADS * heads.HEAD_DIM, size)
    w["layers.0.self_attn.v_proj.weight"] = torch.cat([half, torch.zeros_like(half)], dim=-1)
    spread = torch.zeros(size, heads.HEADS * heads.HEAD_DIM)
    for h in (0, 2):
        for d in range(heads.HEAD_DIM):
            spread[h // 2 * heads.HEAD_DIM + d, h * heads.HEAD_DIM + d] = 1
    w["layers.0.self_attn.o_proj.weight"] = spread
    chosen = torch.tensor(head.kept)
    w["lm_head.weight"] = target.get_output_embeddings().weight.detach()[chosen].clone()
    return head


@pytest.fixture
def markov(tiny):
    """A target whose layers do nothing and whose embeddings have twelve dimensions in use of 24."""
    model = tiny.build("llama", hidden_size=24)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, heads.KV_HEADS * heads.HEAD_DIM :] = 0
    return model


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_head_that_knows_the_target_is_accepted(tiny, markov, tmp_path, trimmed):
    """Wrong pairing of tokens, features or vocabularies would cost acceptance."""
    head = knowing(markov, KEPT if trimmed else None)
    folder = heads.write(head, tmp_path / "head", markov, "speculators")
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"] |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 1}
    config["transformer_layer_config"]["use_sliding_window"] = True
    (folder / "config.json").write_text(json.dumps(config))
    prompt = tiny.prompts(3) | {"max_new_tokens": 20, "do_sample": False}
    out = accel.generate(markov, artifacts=[folder], drafter="lm", draft_length=3, **prompt)
    tiny.assert_similar(out, tiny.reference(markov, **prompt))
    rate = accel.stats(markov).acceptance_rate
    assert 0.1 < rate < 0.95 if trimmed else rate > 0.95


@pytest.mark.parametrize("layout", ["speculators", "safeailab", "specforge"])
@pytest.mark.parametrize("drafter", ["lm", "auto"])
def test_greedy_output_is_plain(tiny, tmp_path, layout, drafter):
    target = tiny.build("llama", num_hidden_layers=8)
    head = heads.random_head(target, (2, 4, 5), KEPT)
    folder = heads.write(head, tmp_path / "head", target, layout)
    prompt = tiny.prompts(3) | {"max_new_tokens": 10}
    accel.attach(target, folder, drafter=drafter, draft_length=3)
    for _ in range(2):
        out = target.generate(**prompt)
        assert accel.stats(target).drafted_tokens > 0
        tiny.assert_similar(out, tiny.reference(target, **prompt))
    accel.detach(target)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())


def test_sampling_and_several_sequences_of_a_prompt(tiny, target, folder):
    prompt = tiny.prompts(2) | {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3, "top_k": 20}
    out = accel.generate(target, artifacts=[folder], drafter="lm", draft_length=3, seed=4, **prompt)
    again = accel.generate(target, artifacts=[folder], drafter="lm", draft_length=3, seed=4, **prompt)
    assert torch.equal(out, again)
    assert len({tuple(row.tolist()) for row in out}) > 2
    assert accel.stats(target).drafted_tokens > 0


def test_a_head_is_told_from_a_model(tiny, target, folder, tmp_path):
    target.save_pretrained(tmp_path / "model")
    assert is_head(folder)
    assert not is_head(tmp_path / "model")


def test_a_head_in_another_type_takes_the_targets(target, folder):
    save_file({n: t.half() if t.is_floating_point() else t for n, t in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors")  # fmt: skip
    loaded = load_head(folder, target.double())
    assert {p.dtype for p in loaded.head.parameters()} == {torch.float64}
    assert loaded.head.embed_tokens.weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()


def change_config(folder, **changes):
    """Each change goes where its name stands already, and to the top where it is new."""
    config = json.loads((folder / "config.json").read_text())
    layer = config["transformer_layer_config"] | {"layer_types": None}
    for name, value in changes.items():
        place = config["transformer_layer_config"] if name in layer else config
        place[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["eagle", "peagle", "dflash", "mtp"])
def test_other_speculators_are_refused_by_name(target, folder, kind):
    change_config(folder, speculators_model_type=kind)
    with pytest.raises(ArtifactError, match=f"a drafter of type '{kind}': accel runs draft heads of type 'eagle3'"):
        accel.attach(target, folder)


def test_other_drafters_are_refused_by_their_architecture(target, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}))
    with pytest.raises(ArtifactError, match="type 'dflashdraftmodel'"):
        accel.attach(target, tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"hidden_size": 64}, IncompatibleError, "a hidden size of 64, this one has 32: use a head made for"),
        ({"vocab_size": 128}, IncompatibleError, "a vocabulary of 128, this one has 67"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, IncompatibleError, r"\[1, 2, 9\], this target has 0 to 4"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, ArtifactError, r"fc.weight has the shape \[32, 96\], the conf"),
        ({"quantization_config": {"bits": 4}}, ArtifactError, "the draft head is quantised"),
        ({"model_type": "gpt2"}, ArtifactError, "of type 'gpt2': accel knows llama and qwen3 layers"),
        ({"num_hidden_layers": 2}, ArtifactError, r"missing \['layers.1.input_layernorm.weight'"),
        ({"hidden_size": "wide"}, ArtifactError, "hidden_size"),
        ({"draft_vocab_size": "32k"}, ArtifactError, "draft_vocab_size='32k': must be a whole number ≥ 1"),
        ({"eagle_aux_hidden_state_layer_ids": ["1"]}, ArtifactError, r"=\['1'\]: must be a list of whole numbers"),
        ({"layer_types": ["chunked_attention"]}, ArtifactError, "layer_types"),
        ({"intermediate_size": None}, ArtifactError, "does not say intermediate_size"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, ArtifactError, "use_aux_hidden_state is false"),
        ({"target_hidden_size": 32, "hidden_size": 64}, ArtifactError, "no embed_tokens.weight, and the target's has"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(target, folder, changes, error, says):
    change_config(folder, **changes)
    with pytest.raises(error, match=says) as caught:
        accel.attach(target, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm__weight": None}, r"missing \['norm.weight'\]"),
        ({"lm_head__weight_scale": torch.ones(1)}, r"unknown \['lm_head.weight_scale'\]"),
        ({"norm__weight": torch.ones(31)}, r"norm.weight has the shape \[31\], the config asks for \[32\]"),
        ({"norm__weight": torch.ones(32, dtype=torch.int8)}, "norm.weight is torch.int8: give an unquantised"),
        ({"d2t": None}, "no d2t, which a draft vocabulary of 32 of 67 needs"),
        ({"d2t": torch.zeros(32)}, r"d2t is torch.float32 \[32\]: it must be 32 whole numbers"),
        ({"d2t": torch.tensor(KEPT)}, "d2t does not lead to 32 different ids of 67: it must hold offsets"),
    ],
)
def test_weights_that_do_not_fit_are_refused(target, folder, changes, says):
    change_weights(folder, **changes)
    with pytest.raises(ArtifactError, match=says):
        accel.attach(target, folder)


def test_files_that_are_not_safetensors_are_refused(target, folder):
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        accel.attach(target, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model.bin, which can run code .* convert it to model.safetens"):
        accel.attach(target, folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"has no \*.safetensors file"):
        accel.attach(target, folder)
    for text, says in (("{", "cannot be read as JSON"), ("[]", "holds a list: a config is an object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ArtifactError, match=says):
            accel.attach(target, folder)
