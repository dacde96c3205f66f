"""Embedders: tiny sentence models in sentence-transformers' layout, hidden states, digests, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from refusals import refusal
from transformers import BertConfig, BertModel

from accel.methods.cascade import embedding
from accel.methods.cascade.embedding import HiddenStateEmbedder, SentenceEmbedder, find_embedder
from accel.methods.cascade.store import DemonstrationStore

TEXTS = ["open the door", "a", "the door is open, and behind it there is a garden with an old tree", "7"]


def save_sentence_model(where, pooling="pooling_mode_mean_tokens", kinds=("Transformer", "Pooling", "Normalize")):
    """A random one, as sentence-transformers saves it."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(byte_tokenizer()), **size)).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    (where / "1_Pooling").mkdir()
    (where / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, pooling: True}))
    modules = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (where / "modules.json").write_text(json.dumps(modules))
    (where / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sentence_model(tmp_path_factory.mktemp("models") / "tiny-sentences")


@pytest.fixture(params=["sentences", "hidden states"])
def embedder(request, folder):
    if request.param == "sentences":
        return SentenceEmbedder(folder)
    return HiddenStateEmbedder(byte_llama(max_position_embeddings=512), byte_tokenizer())


def test_unit_vectors_that_do_not_depend_on_what_stands_beside(embedder):
    together = embedder.embed(TEXTS)
    assert together.shape == (4, embedder.size) and together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=-1), torch.ones(4), atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.allclose(embedder.embed([text])[0], vector, atol=1e-5)
    assert bool(torch.isfinite(embedder.embed([""])).all())


def test_what_stands_at_padded_positions_does_not_matter():
    def states(batch):
        hidden = batch["input_ids"].float()[..., None].repeat(1, 1, 3)
        return hidden.masked_fill(batch["attention_mask"][..., None] == 0, float("nan"))

    means = embedding._pooled(TEXTS, byte_tokenizer(), states, 20, torch.device("cpu"))
    for text, mean in zip(TEXTS, means, strict=True):
        ids = torch.tensor(byte_tokenizer()(text)["input_ids"][:20])
        assert torch.allclose(mean, ids.float().mean().expand(3))


def test_the_mean_over_the_tokens(folder):
    made = SentenceEmbedder(folder)
    assert made.max_tokens == 20
    ids = byte_tokenizer()(TEXTS[2])["input_ids"][:20]
    with torch.no_grad():
        states = BertModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(0), dim=-1)
    assert torch.allclose(made.embed([TEXTS[2]])[0], expected, atol=1e-5)


def test_hidden_states_without_what_all_texts_share():
    model, tokenizer = byte_llama(max_position_embeddings=512), byte_tokenizer()
    made = HiddenStateEmbedder(model, tokenizer)

    def mean(text):
        ids = torch.tensor([tokenizer(text)["input_ids"][: embedding.MAX_TOKENS]])
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)

    common = torch.stack([mean(text) for text in embedding.UNRELATED]).mean(0)
    for text in TEXTS:
        expected = torch.nn.functional.normalize(mean(text) - common, dim=-1)
        assert torch.allclose(made.embed([text])[0], expected, atol=1e-4)


def test_a_digest_tells_weights_apart(folder, tmp_path):
    assert SentenceEmbedder(folder).digest == SentenceEmbedder(folder).digest
    other = save_sentence_model(tmp_path / "other")
    (other / "sentence_bert_config.json").write_text('{"max_seq_length": 21}')
    assert SentenceEmbedder(other).digest != SentenceEmbedder(folder).digest
    model = byte_llama(max_position_embeddings=512)
    before = HiddenStateEmbedder(model, byte_tokenizer())
    assert HiddenStateEmbedder(model, byte_tokenizer()).digest == before.digest
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert HiddenStateEmbedder(model, byte_tokenizer()).digest != before.digest


def test_a_store_keeps_to_its_embedder(folder, tmp_path):
    DemonstrationStore(tmp_path / "s.sqlite", SentenceEmbedder(folder)).close()
    other = HiddenStateEmbedder(byte_llama(max_position_embeddings=512), byte_tokenizer())
    message = refusal(lambda: DemonstrationStore(tmp_path / "s.sqlite", other))
    assert "made with tiny-sentences" in message and "hidden states" in message


def test_where_an_embedder_is_found(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "PACKAGED", "a_package_that_is_not_there")
    assert "nothing to embed texts with" in refusal(find_embedder)
    model, tokenizer = byte_llama(max_position_embeddings=512), byte_tokenizer()
    assert isinstance(find_embedder(model=model, tokenizer=tokenizer), HiddenStateEmbedder)
    assert find_embedder(folder).name == "tiny-sentences"
    # a package that ships a model is used without being imported
    package = tmp_path / "packaged_sentences"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    save_sentence_model(package / "model")
    monkeypatch.setattr(embedding, "PACKAGED", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    found = find_embedder(model=model, tokenizer=tokenizer)
    assert isinstance(found, SentenceEmbedder) and found.name == "packaged_sentences"
    assert package.name not in sys.modules


def test_refusals(tmp_path):
    assert "no config.json" in refusal(lambda: SentenceEmbedder(tmp_path))
    cls = save_sentence_model(tmp_path / "a", pooling="pooling_mode_cls_token")
    assert "pools by cls_token" in refusal(lambda: SentenceEmbedder(cls))
    dense = save_sentence_model(tmp_path / "b", kinds=("Transformer", "Pooling", "Dense"))
    assert "Transformer, Pooling, Dense" in refusal(lambda: SentenceEmbedder(dense))
    (dense / "modules.json").write_text("{")
    assert "is not JSON" in refusal(lambda: SentenceEmbedder(dense))
    broken = save_sentence_model(tmp_path / "c")
    (broken / "model.safetensors").write_bytes(b"x")
    assert "cannot load the sentence model" in refusal(lambda: SentenceEmbedder(broken))
