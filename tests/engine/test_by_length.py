"""lawcat="auto" and lawcat=N: which layers a call runs on, that it is exactly those, and that nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from linear_models import random_tensors

import accel
from accel.engine import by_length
from accel.engine.by_length import Times
from accel.errors import AccelError, IncompatibleError, OptionError
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.lawcat.artifact import Lawcat
from accel.models.lean import target_for
from accel.models.linear import LinearSpec, LowRank, is_linear
from accel.models.row_cache import Segment

NEW = 6


def lawcat(model, layers=(0, 1), low_rank=None):
    spec = LinearSpec(layers, 4, gate_rank=3)
    return Lawcat.of("a-lawcat", spec, random_tensors(model.config, spec, low_rank), model, low_rank=low_rank)


def prompt(length):
    return torch.randint(3, 67, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def model(tiny):
    made = tiny.build("llama", max_position_embeddings=4096)
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def timed(monkeypatch):
    """Times that are said and not taken: a prompt of n tokens (n / 1000)² s for softmax, n / 1000 s for linear."""
    asked = []

    def times(target, length):
        if length != by_length.WARM:
            asked.append((length, is_linear(target.model)))
        thousand = length / 1000
        return Times(thousand, 0.5) if is_linear(target.model) else Times(thousand**2, 0.1)

    monkeypatch.setattr(by_length, "times", times)
    return asked


@pytest.mark.parametrize("low_rank", [None, LowRank(2, 4.0)], ids=["plain", "lora"])
@pytest.mark.parametrize(
    "options", [{"method": "plain"}, {"drafter": "ngram", "draft_length": 3}], ids=["plain", "ngram"]
)
def test_a_call_is_exactly_one_of_the_two(model, options, low_rank):
    made, short, long = lawcat(model, low_rank=low_rank), prompt(19), prompt(20)
    wanted = {}
    for name, given in (("softmax", ()), ("linear", (made,))):
        accel.attach(model, *given, **options)
        wanted[name] = [model.generate(ids, max_new_tokens=NEW).tolist() for ids in (short, long)]
        accel.detach(model)
    assert wanted["softmax"][1] != wanted["linear"][1]
    accel.attach(model, made, lawcat=20, **options)
    for _ in range(2):
        assert model.generate(short, max_new_tokens=NEW).tolist() == wanted["softmax"][0]
        assert accel.stats(model).lossless and not is_linear(model)
        assert "softmax layers: linear from 20 tokens on, as asked" in accel.stats(model).notes
        assert model.generate(long, max_new_tokens=NEW).tolist() == wanted["linear"][1]
        assert not accel.stats(model).lossless and not is_linear(model)
        assert any("not the softmax model's own" in note for note in accel.stats(model).notes)


def test_nothing_stays_behind(model):
    before = copy.deepcopy(model.state_dict())
    names, layers = list(before), [layer.self_attn for layer in model.model.layers]
    accel.attach(model, lawcat(model, low_rank=LowRank(2, 4.0)), lawcat=10, method="plain")
    # the model itself is the softmax one, with fast linear layers in both
    assert [layer.self_attn for layer in model.model.layers] == layers and list(model.state_dict()) == names
    assert all("forward" in layer.q_proj.__dict__ for layer in layers)
    conversion = model._accel_attached._conversion
    assert all("forward" in layer.q_proj.__dict__ for layer in conversion._linear.values())
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    model(torch.arange(4)[None], attention_mask=mask)  # linear layers would refuse such a mask
    model.generate(prompt(12), max_new_tokens=2)
    accel.detach(model)
    assert [layer.self_attn for layer in model.model.layers] == layers
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model.get_decoder()._forward_pre_hooks
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_auto_times_a_length_once_and_goes_by_the_whole_call(model, timed):
    accel.attach(model, lawcat(model), lawcat="auto", method="plain")

    def linear(length, new=1):
        model.generate(prompt(length), max_new_tokens=new)
        return not accel.stats(model).lossless

    assert not linear(255) and timed == []
    assert "softmax layers: the prompt is shorter than 256 tokens" in accel.stats(model).notes
    assert not linear(300) and not linear(511)
    # one is clearly faster there
    assert timed == [(256, False), (256, True)]
    assert not linear(1500) and not linear(2047)
    # 2048 tokens: 4.2 s and 0.1 s a token by softmax layers, 2.0 s and 0.5 s by linear ones
    assert linear(2048) and linear(2048, new=5) and not linear(2048, new=6)
    # 3000 tokens are one and a half times as many
    assert linear(3000, new=7) and not linear(3000, new=8)
    # at 1024 tokens they are so close that both are timed again
    assert [length for length, _ in timed] == [256] * 2 + [1024] * 4 + [2048] * 2
    assert any(
        "timed here at 2048 tokens: softmax 4.19 s + 100 ms a token" in each for each in accel.stats(model).notes
    )


def test_a_very_long_prompt_is_judged_by_the_longest_length_that_is_timed(model, timed, monkeypatch):
    monkeypatch.setattr(by_length, "LONGEST", 1024)
    chooser = by_length.ByLength(lawcat(model).conversion(model))
    chooser.conversion.install()
    assert chooser._choice(4000, 1)[0] is False and {length for length, _ in timed} == {1024}


def test_beyond_the_positions_there_is_only_one(tiny, timed):
    model = tiny.build("llama", max_position_embeddings=40)
    accel.attach(model, lawcat(model), lawcat=1000, method="plain")
    assert model.generate(prompt(41), max_new_tokens=2).shape == (1, 43)
    assert "linear layers: the softmax model has 40 positions" in accel.stats(model).notes
    assert accel.stats(model).lossless is False and timed == []
    # layers that stay softmax have no more positions than before
    accel.attach(model, lawcat(model, layers=(1,)), lawcat=1000, method="plain")
    with pytest.raises(OptionError, match="takes 41 positions"):
        model.generate(prompt(41), max_new_tokens=2)
    assert "softmax layers: linear from 1000 tokens on, as asked" in accel.stats(model).notes


def test_what_is_timed_is_the_reading_and_the_next_tokens(model):
    for linear in (False, True):
        conversion = lawcat(model).conversion(model)
        conversion.install()
        conversion.use(linear=linear)
        target = target_for(model)
        seen = []
        forward = target.forward
        target.forward = lambda tokens, *args, seen=seen, forward=forward, **kwargs: (
            seen.append(tokens.shape[1]) or forward(tokens, *args, **kwargs)
        )
        ticks = iter([0, 7, *(tick for step in range(by_length.STEPS) for tick in (10 * step, 10 * step + 5 - step))])
        found = by_length.times(target, 300, clock=lambda ticks=ticks: next(ticks))
        assert found == Times(7, 5 - (by_length.STEPS - 1)) and seen == [300] + [1] * by_length.STEPS
        assert not target.cache.rows and target.state_bytes() == 0
        conversion.remove()


def test_the_fastest_of_several_runs_counts(model, monkeypatch):
    said = iter([Times(0, 0), Times(0, 0), Times(3, 2), Times(4, 9), Times(2, 4), Times(5, 1)])
    monkeypatch.setattr(by_length, "times", lambda target, length: next(said))
    chooser = by_length.ByLength(lawcat(model).conversion(model))
    chooser.conversion.install()
    point = chooser._timed(256)
    assert (point.softmax, point.linear) == (Times(2, 2), Times(4, 1))


def test_a_call_that_fails_and_one_with_its_own_cache_leave_softmax_layers(model, timed):
    accel.attach(model, lawcat(model), lawcat=10, method="plain")

    def broken(ids, scores):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(prompt(20), max_new_tokens=2, logits_processor=[broken])
    assert not is_linear(model)
    cache = model(prompt(20), use_cache=True).past_key_values
    ids = torch.cat([prompt(20), prompt(2)], 1)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=2)
    assert torch.equal(found, accel.detach(model).generate(ids, max_new_tokens=2))


def test_transformers_own_search_runs_on_the_same_layers(model):
    made, ids = lawcat(model), prompt(20)
    accel.attach(model, made, method="plain")
    wanted = model.generate(ids, max_new_tokens=4, num_beams=2)
    accel.attach(model, made, lawcat=20, method="plain")
    assert torch.equal(model.generate(ids, max_new_tokens=4, num_beams=2), wanted)
    assert not is_linear(model)


@pytest.mark.parametrize("given", [0, -3, True, 2.5, "8"])
def test_a_length_is_a_number_of_tokens(model, given):
    with pytest.raises(OptionError, match="or the number of tokens from which on"):
        accel.attach(model, lawcat(model), lawcat=given)


def test_a_cartridge_is_refused_here_too(model):
    keys = tuple(torch.zeros(2, 3, 8) for _ in range(2))
    cartridge = Cartridge.of("a-cartridge", Segment(keys, keys, 3), model, method="test")
    with pytest.raises(IncompatibleError, match="a cartridge with the linear attention"):
        accel.attach(model, lawcat(model), cartridge, lawcat="auto")
    with pytest.raises(AccelError, match="without a lawcat artifact"):
        accel.attach(model, lawcat="auto")
