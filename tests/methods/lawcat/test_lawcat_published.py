"""Published parameter names: there and back, what is left out when shared, LoRA, and what is refused."""

from __future__ import annotations

import pytest
import torch
from linear_models import random_tensors

from accel.errors import ArtifactError, OptionError
from accel.methods.lawcat.artifact import Lawcat
from accel.methods.lawcat.published import adopt, published_names
from accel.models.linear import LinearSpec, LowRank

SPECS = {
    "as published": {},
    "some layers": {"layers": (1,)},
    "shared and tied": {"share_conv": True, "tie_maps": True},
    "full gate": {"gate_rank": None},
    "window": {"window": 4, "affine": True},
    "no conv": {"conv_width": 0},
}


def made(model, low_rank=None, **spec):
    chosen = LinearSpec(**{"layers": (0, 1), "feature_size": 4, "gate_rank": 3} | spec)
    return Lawcat.of("x", chosen, random_tensors(model.config, chosen, low_rank), model, low_rank=low_rank)


@pytest.mark.parametrize("low_rank", [None, LowRank(2, 16.0)], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_go_there_and_back(tiny, spec, low_rank):
    model = tiny.build("llama")
    ours = made(model, low_rank, **spec)
    theirs = published_names(ours)
    trained = {name: tensor for name, tensor in theirs.items() if "lora" not in name}
    added = {name: tensor for name, tensor in theirs.items() if "lora" in name}
    choices = {name: value for name, value in spec.items() if name in ("window", "affine")}
    found = adopt("x", [trained, added], model, lora_alpha=None if low_rank is None else 16.0, **choices)
    assert (found.spec, found.low_rank) == (ours.spec, low_rank)
    assert found.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in ours.tensors.items())


def test_the_names_are_the_authors(tiny):
    ours = made(tiny.build("llama"), LowRank(2, 16.0))
    theirs = published_names(ours)
    own = {name.removeprefix("model.layers.0.self_attn.") for name in theirs if name.startswith("model.layers.0.")}
    assert own == {
        "q_conv1d.weight",
        "k_conv1d.weight",
        "feature_map_q.mlp.layer",
        "feature_map_k.mlp.layer",
        "gk_proj.0.weight",
        "gk_proj.1.weight",
        "gk_proj.1.bias",
    }
    assert theirs["model.layers.0.self_attn.q_conv1d.weight"].shape == (32, 1, 4)
    assert "base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight" in theirs
    # the taps of channel d of head h are those of channel h · D + d
    conv, taps = theirs["model.layers.0.self_attn.q_conv1d.weight"], ours.tensors["layers.0.q_taps"]
    assert torch.equal(conv[2 * 8 + 5, 0], taps[2, 5])


def test_a_later_stage_wins_and_unused_parameters_fall(tiny):
    model = tiny.build("llama")
    stage1 = published_names(made(model))
    stage1["model.layers.0.self_attn.g_norm.weight"] = torch.ones(8)
    stage1["model.layers.0.self_attn.window_factors"] = torch.zeros(1, 4, 1, 1)
    name = "layers.0.self_attn.feature_map_q.mlp.layer"
    stage2 = {f"base_model.model.model.{name}": stage1[f"model.{name}"] + 1}
    found = adopt("x", [stage1, stage2], model)
    assert torch.equal(found.tensors["layers.0.q_map"], stage1[f"model.{name}"] + 1)
    assert not any("window" in each for each in found.tensors)


def test_lolcats_has_its_own_terms(tiny):
    model = tiny.build("llama")
    names = {f"model.layers.{n}.self_attn.feature_map_{x}.mlp.layer": torch.ones(4, 8, 4) for n in (0, 1) for x in "qk"}
    plain = adopt("x", [names], model, family="lolcats").spec
    assert (plain.rope, plain.scaled, plain.gate_rank, plain.conv_width, plain.eps) == (True, False, 0, 0, 1e-12)
    factors = {f"model.layers.{n}.self_attn.window_factors": torch.zeros(1, 4, 1, 1) for n in (0, 1)}
    hybrid = adopt("x", [names | factors], model, family="lolcats", window=64).spec
    assert (hybrid.covers_window, hybrid.eps, hybrid.window) == (False, 0.0, 64)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"model.embed_tokens.weight": torch.ones(2)}, {}, ArtifactError, "no parameter of a linear layer"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, {}, ArtifactError, "known are q_conv1d"),
        ({"model.layers.0.self_attn.q_conv1d.conv1.weight": torch.ones(2)}, {}, ArtifactError, "only one conv"),
        ({"model.layers.0.self_attn.q_conv1d.weight": torch.ones(3, 1, 4)}, {}, ArtifactError, r"\[32, 1, taps\]"),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)},
            {},
            OptionError,
            "give lora_alpha",
        ),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)},
            {"lora_alpha": 16},
            ArtifactError,
            "without layers.0.q_proj.lora_B",
        ),
        ({}, {"lora_alpha": 16}, OptionError, "has no LoRA"),
        ({}, {"family": "hedgehog"}, OptionError, "choose lawcat or lolcats"),
        ({}, {"conv_width": 4}, OptionError, "no choice here"),
        ({}, {"window": 4}, ArtifactError, "missing .*window_factors"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny, change, options, error, message):
    model = tiny.build("llama")
    with pytest.raises(error, match=message):
        adopt("x", [published_names(made(model)) | change], model, **options)
    with pytest.raises(ArtifactError, match="no tensors"):
        adopt("x", [{}], model)
