"""Embeddings that look back: against torch's own causal convolution, in pieces, and in a model's artifact."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from accel.errors import IncompatibleError, OptionError
from accel.models.lagged import LaggedEmbedding, Recent, install
from accel.models.softmax_target import SoftmaxTarget

VOCAB, WIDTH, LAGS = 13, 16, 3


def embedding(lags: int = LAGS) -> LaggedEmbedding:
    torch.manual_seed(0)
    made = LaggedEmbedding(torch.nn.Parameter(torch.randn(VOCAB, WIDTH)), lags)
    torch.nn.init.normal_(made.lag_weight)
    return made


def model(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = install(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, embedding_lags=2, **sizes, **more)).eval())
    torch.nn.init.normal_(made.get_input_embeddings().lag_weight, std=0.2)
    return made


def test_whole_texts_are_a_causal_convolution():
    made, tokens = embedding(), torch.randint(VOCAB, (2, 9))
    taps = torch.stack([torch.eye(WIDTH), *made.lag_weight]).flip(0)  # the oldest first
    x = F.pad(F.embedding(tokens, made.weight).transpose(1, 2), (LAGS, 0))
    expected = F.conv1d(x, taps.permute(1, 2, 0)).transpose(1, 2)
    torch.testing.assert_close(made(tokens), expected)


def test_a_fresh_one_only_looks_up():
    made = LaggedEmbedding(torch.nn.Parameter(torch.randn(VOCAB, WIDTH)), LAGS)
    tokens = torch.randint(VOCAB, (2, 9))
    assert torch.equal(made(tokens), F.embedding(tokens, made.weight))
    assert not made.lag_weight.grad and made.lag_weight.requires_grad


def test_the_table_sums_to_the_same():
    made, tokens = embedding(), torch.randint(VOCAB, (1, 6))
    table = made.table()
    for t in range(6):
        places = [lag * VOCAB + int(tokens[0, t - lag]) if t >= lag else len(table) - 1 for lag in range(LAGS + 1)]
        torch.testing.assert_close(table[places].sum(0), made(tokens)[0, t])


def test_pieces_of_a_text_are_the_whole_of_it():
    made, tokens = embedding(), torch.randint(VOCAB, (1, 9))
    recent = Recent(LAGS)
    recent.open(5)
    parts = []
    for first, end, wrong in ((0, 1, 2), (1, 4, 0), (4, 5, 1), (5, 9, 3)):
        read = [*tokens[0, first:end].tolist(), *[7] * wrong]
        before = torch.tensor(recent.read([5], [read]))
        parts.append(made.behind(torch.tensor([read]), before)[:, : end - first])
        recent.commit([5], [end - first])
    torch.testing.assert_close(torch.cat(parts, 1), made(tokens))


def test_rows_that_were_forked_go_their_own_ways():
    recent = Recent(2)
    recent.open(0)
    recent.read([0], [[1, 2, 3]])
    recent.commit([0], [3])
    recent.fork(0, [1, 2])
    recent.close([0])
    assert recent.read([2, 1], [[4], [5, 6]]) == [[2, 3], [2, 3]]
    recent.commit([2, 1], [0, 1])
    assert recent.read([1, 2], [[7], [7]]) == [[3, 5], [2, 3]]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_and_saved_as_the_family_does(tied):
    made = model(tie_word_embeddings=tied)
    assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
    assert "model.embed_tokens.lag_weight" in made.state_dict()
    made(input_ids=torch.randint(VOCAB, (1, 5)), labels=torch.randint(VOCAB, (1, 5))).loss.backward()
    assert made.get_input_embeddings().lag_weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_softmax_target_reads_what_the_model_reads():
    made, tokens = model(), torch.randint(VOCAB, (1, 12))
    expected, target = made(input_ids=tokens).logits, SoftmaxTarget(made)
    row = target.open()
    target.forward(tokens[:, :4], [row])
    target.commit([4], [row])
    # two tentative steps, of which one token stays
    target.forward(tokens[:, 4:5], [row])
    target.forward(tokens[:, 7:9], [row])
    target.commit([1], [row])
    got = target.forward(tokens[:, 5:], [row])
    torch.testing.assert_close(got, expected[:, 5:], rtol=1e-4, atol=1e-5)


def test_config_and_family_are_checked():
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1))
    assert install(plain) is plain and type(plain.get_input_embeddings()) is torch.nn.Embedding
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, embedding_lags=9)
    with pytest.raises(OptionError, match=r"lags=9: .* from 0 to 8"):
        install(GPT2LMHeadModel(config))
    scaled = model()
    with pytest.raises(IncompatibleError, match="LaggedEmbedding, which does more than look up"):
        install(scaled)
