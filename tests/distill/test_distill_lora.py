"""Low-rank additions: nothing at first, the same before and after merging, and every named target there."""

from __future__ import annotations

import pytest
import torch

from accel.distill.lora import Lora, layers
from accel.errors import OptionError

TOKENS = torch.arange(3, 15)[None]


def stirred(lora):
    with torch.no_grad():
        for addition in lora.additions:
            addition.b.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return lora


@torch.no_grad()
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "mlp.up_proj")])
def test_merged_is_what_was_trained(tiny, targets):
    model = tiny.build("llama")
    before = model(TOKENS).logits
    lora = Lora(model, rank=4, alpha=8.0, targets=targets)
    assert torch.equal(model(TOKENS).logits, before)
    assert len(lora.names) == (14 if targets == ("all",) else 4) == len(lora.additions)
    assert sum(each.numel() for each in lora.parameters()) < sum(each.numel() for each in model.parameters())
    added = (stirred(lora), model(TOKENS).logits)[1]
    assert (added - before).abs().max() > 0.1
    lora.merge()
    merged = model(TOKENS).logits
    assert ((merged - added).pow(2).mean() / added.pow(2).mean()).sqrt() < 1e-5
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_removed_is_the_model_as_it_was(tiny):
    model = tiny.build("qwen2")
    before = model(TOKENS).logits
    lora = stirred(Lora(model, rank=2, alpha=2.0))
    assert not torch.equal(model(TOKENS).logits, before)
    lora.remove()
    assert torch.equal(model(TOKENS).logits, before)


def test_the_head_is_no_target_and_unknown_ones_are_named(tiny):
    model = tiny.build("llama")
    assert not [name for name in layers(model, ("all",)) if "lm_head" in name]
    with pytest.raises(OptionError, match=r"'attn_out' names no linear layer; the model has down_proj, gate_proj"):
        layers(model, ("q_proj", "attn_out"))
    # a part of a name is not its end
    with pytest.raises(OptionError, match="'proj' names no linear layer"):
        layers(model, ("proj",))
    with pytest.raises(OptionError, match="rank ≥ 1"):
        Lora(model, rank=0, alpha=1.0)
    with pytest.raises(OptionError, match="has no linear layers"):
        layers(tiny.build("gpt2"), ("all",))
