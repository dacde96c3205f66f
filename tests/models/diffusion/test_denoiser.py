"""Bidirectional logits of chosen positions, padding that changes nothing, and blocks in front of kept keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusion_models import rms_ratio
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5

from accel.errors import IncompatibleError, ModelError
from accel.models.diffusion import BlockCache, Denoiser, DiffusionFacts

MASK = 3
WITH_CACHE = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2", "phi3")
WINDOWED = ("mistral", "gemma3_text")
MASKED_LM = ("bert", "roberta", "modernbert", "distilbert")


def facts(**fields: Any) -> DiffusionFacts:
    return DiffusionFacts(**{"mask_token": MASK} | fields)


def masked_lm(family: str, **extra: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "dim": 32, "num_hidden_layers": 2, "n_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=67, initializer_range=0.2, **sizes, **tokens, **extra)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForMaskedLM.from_config(config).eval()


def rows(*lengths: int, seed: int = 11) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = [torch.randint(4, 67, (length,), generator=g) for length in lengths]
    for row in out:
        row[::2] = MASK
    return out


def every(row: Tensor) -> Tensor:
    return torch.arange(len(row))


@pytest.mark.parametrize("family", [*WITH_CACHE, *WINDOWED, *MASKED_LM])
def test_a_batch_is_its_rows_alone(tiny: Any, family: str) -> None:
    model = masked_lm(family) if family in MASKED_LM else tiny.build(family)
    denoiser = Denoiser(model, facts())
    batch = rows(7, 12, 1, 4)
    together = denoiser.logits(batch, [every(row) for row in batch])
    for row, logits in zip(batch, together, strict=True):
        (alone,) = denoiser.logits([row], [every(row)])
        assert logits.shape == (len(row), 67) and rms_ratio(logits, alone) <= 1e-5


@pytest.mark.parametrize("family", [*WITH_CACHE, *WINDOWED])
def test_every_position_sees_every_other(tiny: Any, family: str) -> None:
    denoiser = Denoiser(tiny.build(family), facts())
    (row,) = rows(9)
    (before,) = denoiser.logits([row], [every(row)])
    for position in (0, 4, 8):
        other = row.clone()
        other[position] = 60
        (after,) = denoiser.logits([other], [every(row)])
        assert ((after - before).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_without_causality_is_the_average_that_the_equations_say(tiny: Any, implementation: str) -> None:
    # one layer whose output is its attention alone: logits of a row without order
    model = tiny.build("llama", num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    (row,) = rows(6)
    (logits,) = Denoiser(model, facts()).logits([row], [every(row)])
    x = model.model.embed_tokens(row)
    values = layer.self_attn.v_proj(layer.input_layernorm(x)).mean(0).view(2, 1, 8).expand(2, 2, 8).reshape(-1)
    expected = model.lm_head(model.model.norm(x + layer.self_attn.o_proj(values)))
    assert rms_ratio(logits, expected) <= 1e-5


def test_only_what_is_asked_reaches_the_head(tiny: Any) -> None:
    model = tiny.build("llama")
    denoiser = Denoiser(model, facts())
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.numel() // 67))
    batch = rows(9, 5)
    asked = [torch.tensor([7, 2]), torch.tensor([], dtype=torch.int64)]
    some = denoiser.logits(batch, asked)
    handle.remove()
    assert seen == [2] and [each.shape for each in some] == [(2, 67), (0, 67)]
    (whole,) = denoiser.logits(batch[:1], [every(batch[0])])
    assert rms_ratio(some[0], whole[[7, 2]]) <= 1e-5
    assert not model.lm_head._forward_pre_hooks, "the model is left as it was"


def test_a_class_that_does_more_with_its_output_is_run_whole(tiny: Any) -> None:
    model = tiny.build("llama")
    plain = model.forward

    def relative(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        # depends on where a position stands, which a head that sees a few of them cannot know
        out.logits = out.logits * (1 + torch.arange(out.logits.shape[1]))[:, None]
        return out

    (row,) = rows(6)
    whole = Denoiser(tiny.build("llama"), facts()).logits([row], [every(row)])[0]
    model.forward = relative
    (some,) = Denoiser(model, facts()).logits([row], [torch.tensor([2])])
    assert rms_ratio(some, 3 * whole[[2]]) <= 1e-5


def test_shifted_models_are_unshifted(tiny: Any) -> None:
    model = tiny.build("qwen2")
    (row,) = rows(8)
    (plain,) = Denoiser(model, facts()).logits([row], [every(row)])
    (shifted,) = Denoiser(model, facts(shift=True)).logits([row], [every(row)])
    assert torch.allclose(shifted, torch.cat([plain[:1], plain[:-1]]), atol=1e-5)


def test_gradients_only_where_they_are_asked_for(tiny: Any) -> None:
    denoiser = Denoiser(tiny.build("llama").train(), facts())
    assert denoiser.model.training
    (row,) = rows(5)
    assert not denoiser.logits([row], [every(row)])[0].requires_grad
    denoiser.differentiable([row], [every(row)])[0].sum().backward()
    assert denoiser.model.model.embed_tokens.weight.grad is not None


def test_under_autocast_and_in_half_precision(tiny: Any) -> None:
    model = tiny.build("llama")
    batch = rows(9, 4)
    exact = Denoiser(model, facts()).logits(batch, [every(row) for row in batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        casts = Denoiser(model, facts()).logits(batch, [every(row) for row in batch])
    halves = Denoiser(copy.deepcopy(model).bfloat16(), facts()).logits(batch, [every(row) for row in batch])
    for logits in (*casts, *halves):
        assert logits.dtype is torch.bfloat16
    for ours, theirs in zip((*casts, *halves), (*exact, *exact), strict=True):
        assert rms_ratio(ours, theirs) <= 5e-2


# -- blocks in front of kept keys and values --


@pytest.mark.parametrize("family", WITH_CACHE)
@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_a_block_read_again_at_once_says_the_same(tiny: Any, family: str, dual: bool, shift: bool) -> None:
    denoiser = Denoiser(tiny.build(family), facts(shift=shift))
    assert denoiser.supports_cache
    batch = rows(10, 16, 5)
    start, stop = [4, 8, 0], [8, 16, 3]
    cache, whole = denoiser.open(batch, start, stop, dual=dual)
    blocks = [torch.arange(a, b) for a, b in zip(start, stop, strict=True)]
    exact = denoiser.logits(batch, blocks)
    for _ in range(2):
        again = denoiser.logits_cached(cache, batch, blocks)
        for ours, first, theirs in zip(again, whole, exact, strict=True):
            assert rms_ratio(first, theirs) <= 1e-5 and rms_ratio(ours, theirs) <= 1e-5
    assert cache.nbytes() == sum(t.numel() * 4 for t in (*cache.keys, *cache.values)) > 0


def _kept(denoiser: Denoiser, rows: list[Tensor], changed: list[Tensor], window: tuple[int, int]) -> Tensor:
    """The first row's logits where its layers see keys of ``rows`` outside ``window`` and of ``changed`` inside."""
    model = denoiser.model
    first, end = window
    length = len(rows[0])
    before = model(rows[0][None], attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool), use_cache=True)
    kept = before.past_key_values
    for layer in kept.layers:
        outside = [i for i in range(length) if not first <= i < end]
        layer.keys, layer.values = layer.keys[:, :, outside], layer.values[:, :, outside]
    n = end - first
    out = model(
        changed[0][None, first:end],
        attention_mask=torch.ones(1, 1, n, length, dtype=torch.bool),
        position_ids=torch.arange(first, end)[None],
        past_key_values=kept,
    )
    return out.logits[0]


@pytest.mark.parametrize("dual", [True, False])
@torch.no_grad()
def test_only_the_window_is_read_again(tiny: Any, dual: bool) -> None:
    # transformers' own cache, from which the window's keys were taken, says what the kept ones are
    denoiser = Denoiser(tiny.build("llama"), facts())
    before = rows(12, 9)
    cache, _ = denoiser.open(before, [4, 2], [8, 6], dual=dual)
    after = [row.clone() for row in before]
    after[0][5], after[0][10], after[1][3] = 44, 45, 46
    ours = denoiser.logits_cached(cache, after, [torch.arange(4, 8), torch.arange(2, 6)])
    theirs = _kept(denoiser, before, after, (4, 8) if dual else (4, 12))[:4]
    assert rms_ratio(ours[0], theirs) <= 1e-5
    # and it is another answer than that of the whole row: kept keys do not know what changed
    (exact,) = denoiser.logits(after[:1], [torch.arange(4, 8)])
    assert rms_ratio(ours[0], exact) > 1e-3


def test_rows_of_caches_are_selected_and_joined(tiny: Any) -> None:
    denoiser = Denoiser(tiny.build("qwen3"), facts(shift=True))
    batch = rows(10, 16, 7)
    start, stop = [4, 8, 1], [8, 16, 5]
    blocks = [torch.arange(a, b) for a, b in zip(start, stop, strict=True)]
    whole, _ = denoiser.open(batch, start, stop, dual=True)
    parts = [denoiser.open([r], [a], [b], dual=True)[0] for r, a, b in zip(batch, start, stop, strict=True)]
    changed = [row.clone() for row in batch]
    for row, block in zip(changed, blocks, strict=True):
        row[block[0]] = 50
    expected = denoiser.logits_cached(whole, changed, blocks)
    joined = BlockCache.join([parts[2], BlockCache.join(parts[:2])])
    order = [2, 0, 1]
    got = denoiser.logits_cached(joined, [changed[i] for i in order], [blocks[i] for i in order])
    for ours, index in zip(got, order, strict=True):
        assert rms_ratio(ours, expected[index]) <= 1e-5
    few = joined.select([1, 0])
    assert few.lengths == [10, 7] and few.nbytes() < joined.nbytes()
    got = denoiser.logits_cached(few, [changed[0], changed[2]], [blocks[0], blocks[2]])
    for ours, index in zip(got, (0, 2), strict=True):
        assert rms_ratio(ours, expected[index]) <= 1e-5


@pytest.mark.parametrize("family", [*WINDOWED, *MASKED_LM])
def test_no_cache_where_it_would_be_wrong(tiny: Any, family: str) -> None:
    model = masked_lm(family) if family in MASKED_LM else tiny.build(family)
    denoiser = Denoiser(model, facts())
    assert not denoiser.supports_cache
    with pytest.raises(IncompatibleError, match=r"use cache='none'$"):
        denoiser.open(rows(8), [2], [4], dual=True)


# -- what is refused --


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_models_that_build_their_own_mask_are_refused(tiny: Any, family: str) -> None:
    with pytest.raises(ModelError, match="cannot be read in both directions"):
        Denoiser(tiny.build(family), facts())


def test_models_without_attention_are_refused() -> None:
    config = AutoConfig.for_model("rwkv", vocab_size=67, hidden_size=32, num_hidden_layers=2, context_length=32)
    with pytest.raises(ModelError, match="reads from left to right only"):
        Denoiser(AutoModelForCausalLM.from_config(config).eval(), facts())


def test_a_causal_model_whatever_mask_it_is_given_is_refused(tiny: Any) -> None:
    model = tiny.build("llama")
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": None})
    with pytest.raises(ModelError, match="reads from left to right only"):
        Denoiser(model, facts())


def test_a_model_that_sees_padding_is_refused() -> None:
    model = masked_lm("bert")
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": None})
    with pytest.raises(ModelError, match="sees padding"):
        Denoiser(model, facts())


def test_other_kinds_of_model_are_refused(tiny: Any) -> None:
    t5 = T5(T5Config(vocab_size=67, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    with pytest.raises(ModelError, match="encoder-decoder"):
        Denoiser(t5, facts())
    with pytest.raises(ModelError, match="67 tokens"):
        Denoiser(tiny.build("llama"), facts(mask_token=67))
    flex = tiny.build("llama")
    flex.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        Denoiser(flex, facts())


def test_rows_longer_than_a_table_of_positions(tiny: Any) -> None:
    assert Denoiser(tiny.build("llama"), facts()).max_positions == 256
    roberta = Denoiser(masked_lm("roberta"), facts())
    # one of the table's rows is the padding token's
    assert roberta.max_positions == 39
    roberta.logits(rows(39), [torch.tensor([38])])
    with pytest.raises(ModelError, match="a row of 40 tokens: RobertaForMaskedLM has positions for 39"):
        roberta.logits(rows(40), [torch.tensor([0])])
