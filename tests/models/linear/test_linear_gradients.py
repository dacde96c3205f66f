"""Gradients of a linear layer against those of its equation, written out token by token in fp64."""

from __future__ import annotations

import pytest
import torch
from linear_models import convert, error, naive

from accel.kernels import conv_features, linear_attention
from accel.models.linear import linear_layers, own_parameters

SPECS = {
    "published": {},
    # a step may forget nearly everything: no chunk is two products then
    "fast decay": {"gate_normalizer": 0.3},
    "floor": {"min_log_decay": -0.05},
    "shared": {"share_conv": True, "tie_maps": True, "gate_rank": None, "activation": "silu"},
    "undivided": {"normalised": False},
    "window": {"window": 5, "affine": True},
    "lolcats": {
        "window": 4,
        "covers_window": False,
        "conv_width": 0,
        "gate_rank": 0,
        "scaled": False,
        "rope": True,
        "eps": 0.0,
    },
}
# an fp32 sum over 70 tokens and back; a missing term is 1e-2 or more
BAR = 2e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_are_the_equations(tiny, spec, family):
    model = tiny.build(family)
    convert(model, **spec)
    layer = linear_layers(model)[1]
    weights = dict(own_parameters([layer]))
    weights |= {name: getattr(layer, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for weight in weights.values():
        weight.requires_grad_(True)
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(70, 32, generator=draw).requires_grad_()
    direction = torch.randn(70, 32, generator=draw)
    positions = model.model.rotary_emb(hidden[None], torch.arange(70)[None])
    inputs = [hidden, *weights.values()]
    ours = torch.autograd.grad((layer(hidden[None], positions)[0][0] * direction).sum(), inputs)
    exact = torch.autograd.grad((naive(layer, hidden) * direction).sum(), inputs)
    wrong = {name: error(a, b) for name, a, b in zip(["hidden", *weights], ours, exact, strict=True)}
    assert max(wrong.values()) < BAR, wrong


@pytest.mark.parametrize("spec", [{}, {"window": 5}], ids=["fraction", "terms"])
def test_where_a_kernel_has_no_gradient_the_reference_runs(tiny, spec, monkeypatch):
    model = tiny.build("llama")
    convert(model, **spec)
    layer = linear_layers(model)[0]
    for kernel in (conv_features, linear_attention):
        monkeypatch.setattr(kernel, "runs_triton", lambda x: True)
    positions = model.model.rotary_emb(torch.ones(1, 5, 32), torch.arange(5)[None])
    for weight in (layer.q_map, layer.gate_bias):
        weight.requires_grad_(True)
        (found,) = torch.autograd.grad(layer(torch.ones(1, 5, 32), positions)[0].sum(), [weight])
        assert found.abs().sum() > 0
        weight.requires_grad_(False)
