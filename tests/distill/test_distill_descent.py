"""A step of training: its summands give the whole's gradient, a loss that is no number stops it, who learns, and what
a run takes on disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel.distill import checkpoint
from accel.distill.descent import Descent, alone, update
from accel.errors import ModelError
from accel.methods.lawcat.distill.stage import Stage

HOW = Stage(steps=1, learning_rate=0.1, clip=0.5)


def stepped(losses):
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    row = update(optimizer, layer.parameters(), losses(layer), HOW, 0.1, 7)
    return row, [each.detach().clone() for each in layer.parameters()]


def test_summands_are_the_whole():
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def parts(layer):
        for part in inputs.split(2):
            yield layer(part).square().sum()

    whole, weights = stepped(lambda layer: layer(inputs).square().sum())
    found, others = stepped(parts)
    assert {name: found[name] == pytest.approx(whole[name], rel=1e-5) for name in whole} == dict.fromkeys(whole, True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, others, strict=True))
    assert whole["norm"] > HOW.clip and whole["learning_rate"] == 0.1


def test_a_loss_that_is_no_number_stops_before_the_step():
    def parts(layer):
        yield layer.weight.sum()
        yield layer.weight.sum() * float("nan")

    with pytest.raises(ModelError, match="step 7: the loss is nan"):
        stepped(parts)


def test_one_learns_alone_and_all_are_as_before():
    model, other = nn.Linear(2, 2), nn.Parameter(torch.ones(1), requires_grad=False)
    model.bias.requires_grad_(False)
    with alone([model.bias, other], model):
        assert (model.weight.requires_grad, model.bias.requires_grad, other.requires_grad) == (False, True, True)
    assert (model.weight.requires_grad, model.bias.requires_grad, other.requires_grad) == (True, False, False)


def test_a_run_takes_as_much_disk_as_was_said(tmp_path, monkeypatch):
    layer = nn.Linear(800, 800)
    optimizer = torch.optim.AdamW(layer.parameters())
    how = Stage(steps=4, learning_rate=0.1, checkpoint_every=1)
    peaks, replace = [], checkpoint.os.replace

    def watched(new, path):
        peaks.append(sum(each.stat().st_size for each in tmp_path.iterdir()))
        replace(new, path)

    def step(number):
        return update(optimizer, layer.parameters(), layer(torch.ones(800)).square().sum(), how, 0.1, number)

    monkeypatch.setattr(checkpoint.os, "replace", watched)
    Descent(layer, optimizer, tmp_path, {}).run(how, step)
    said = checkpoint.training_bytes(sum(each.numel() for each in layer.parameters()), how.steps)
    assert max(peaks) <= said < max(peaks) + 3 * checkpoint.FRAME + 4 * 512
