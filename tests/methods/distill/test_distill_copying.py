"""Drafts that copy: what they learn it from, and the head that they begin with."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from accel.errors import IncompatibleError
from accel.methods.speculative.distill.copying import BETWEEN, LONGEST, ROWS, SHORTEST, Copies, begin_to_copy
from accel.models.lagged import install

VOCAB = 300
# slow rotations: most of a head's numbers hardly turn over a context
SLOW = {"rope_type": "default", "rope_theta": 1e8}
SIZES = {"vocab_size": VOCAB, "intermediate_size": 64, "num_hidden_layers": 1, "rope_parameters": SLOW}


def draft(kind: type = LlamaForCausalLM, lags: int = 2, hidden: int = 192, **more) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[kind]
    sizes = {"hidden_size": hidden, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32} | SIZES
    return install(kind(config(**sizes, tie_word_embeddings=True, embedding_lags=lags, **more)).eval())


@torch.no_grad()
def share_copied(model: PreTrainedModel, between: int) -> float:
    """Of random tokens that are said again, how many the model says first."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randperm(VOCAB, generator=generator)
    # nothing of the piece stands in between: there would be two answers
    piece, others = tokens[:60], tokens[60:]
    text = torch.cat([piece, others[torch.randint(len(others), (between,), generator=generator)], piece])
    said = model(text[None]).logits[0].argmax(-1)
    first = len(piece) + between
    return float((said[first:-1] == piece[1:]).float().mean())


@pytest.mark.parametrize("between", [0, 40, 400])
def test_a_built_head_copies_what_it_was_never_taught(between: int) -> None:
    model = draft()
    assert share_copied(model, between) < 0.05
    begin_to_copy(model)
    assert share_copied(model, between) > 0.6


def test_what_can_be_taught_of_it_is_left_to_training() -> None:
    model = draft()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    begin_to_copy(model, seed=3)
    changed = {name.split(".")[-2] for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"}
    attention, size = model.model.layers[0].self_attn, 32
    # one of two key heads, and of its three query heads the first; the others have nothing to add yet
    assert torch.equal(attention.k_proj.weight[:size], before["model.layers.0.self_attn.k_proj.weight"][:size])
    queries = before["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(attention.q_proj.weight[: 3 * size], queries[: 3 * size])
    assert torch.equal(attention.q_proj.weight[4 * size :], queries[4 * size :])
    assert attention.o_proj.weight[:, 3 * size : 4 * size].abs().sum() > 0
    assert attention.o_proj.weight[:, 4 * size :].abs().sum() == 0
    again = draft()
    begin_to_copy(again, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_who_cannot_begin_to_copy_is_told() -> None:
    with pytest.raises(IncompatibleError, match="whose embedding looks back"):
        begin_to_copy(draft(lags=0))
    with pytest.raises(IncompatibleError, match="a Qwen3ForCausalLM cannot begin to copy"):
        begin_to_copy(draft(Qwen3ForCausalLM))
    with pytest.raises(IncompatibleError, match="hidden=48: too narrow for a head of 32"):
        begin_to_copy(draft(hidden=48))


def test_what_is_foretold_was_said_before() -> None:
    texts = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 40, 300)]
    can_say = torch.arange(0, VOCAB, 3)
    copies = Copies(texts, can_say, seed=4)
    lengths = set()
    for number in range(30):
        batch = copies.batch(number)
        assert len(batch.tokens) == ROWS == len(batch.lengths)
        where = batch.at.split(list(batch.lengths))
        for row, (places, answer) in enumerate(zip(where, batch.answer.split(list(batch.lengths)), strict=True)):
            columns = places - row * batch.tokens.shape[1]
            text, count = batch.tokens[row], len(answer) + 1
            piece = text[:count]
            assert torch.equal(answer, piece[1:]) and torch.equal(text[columns], piece[:-1])
            assert torch.equal(columns, torch.arange(len(columns)) + columns[0])
            assert int(columns[0]) - count <= max(BETWEEN) and count < LONGEST
            # a whole text where it is shorter
            assert count >= SHORTEST or any(torch.equal(piece, each) for each in texts)
            lengths.add(count)
        again = Copies(texts, can_say, seed=4).batch(number)
        assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.at, batch.at)
    assert len(lengths) > 20
    assert not torch.equal(Copies(texts, can_say, seed=5).batch(0).answer, copies.batch(0).answer)
