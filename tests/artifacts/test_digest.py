"""Digests change exactly when what the model or tokenizer does changes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel.artifacts import config_digest, describe_base, file_digest, tokenizer_digest
from accel.errors import ArtifactError


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(("<unk>", "<pad>", *words))}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 1000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_config_digest_survives_saving_and_loading(tmp_path: Path, config: LlamaConfig) -> None:
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert config_digest(AutoConfig.from_pretrained(tmp_path)) == config_digest(config)


def test_config_digest_ignores_what_computes_nothing(config: LlamaConfig) -> None:
    before = config_digest(config)
    config.pad_token_id, config.use_cache, config.dtype = 3, False, torch.float16
    assert config_digest(config) == before
    assert config_digest({**config.to_dict(), "new_option": None, "transformers_version": "9"}) == before


def test_config_digest_takes_equal_numbers_as_equal() -> None:
    assert config_digest({"a": [{"theta": 10000}]}) == config_digest({"a": [{"theta": 10000.0}]})
    assert config_digest({"a": True}) != config_digest({"a": 1})


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-5}, {"num_hidden_layers": 2}, {"tie_word_embeddings": True}])
def test_config_digest_sees_the_network(config: LlamaConfig, change: dict[str, object]) -> None:
    assert config_digest({**config.to_dict(), **change}) != config_digest(config)


def test_tokenizer_digest_ignores_the_settings_of_the_last_call() -> None:
    tokenizer = word_tokenizer("a", "b")
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b a"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(word_tokenizer("a", "b")) == before
    assert tokenizer_digest(word_tokenizer("b", "a")) != before


def test_tokenizer_digest_without_a_fast_backend() -> None:
    def slow(vocabulary: dict[str, int]) -> SimpleNamespace:
        return SimpleNamespace(get_vocab=lambda: vocabulary)

    assert tokenizer_digest(slow({"a": 0, "b": 1})) == tokenizer_digest(slow({"b": 1, "a": 0}))
    assert tokenizer_digest(slow({"a": 0, "b": 1})) != tokenizer_digest(slow({"a": 1, "b": 0}))


def test_describe_base(config: LlamaConfig) -> None:
    tokenizer = word_tokenizer("a")
    base = describe_base(config, tokenizer, name="tiny")
    assert (base.name, base.revision, base.vocab_size) == ("tiny", None, 32)
    assert base.config_digest == config_digest(config)
    assert base.tokenizer_digest == tokenizer_digest(tokenizer)
    names = [describe_base(each).name for each in (config, LlamaConfig(name_or_path="org/tiny"))]
    assert names == ["unnamed", "org/tiny"]
    with pytest.raises(ArtifactError, match="vocab_size"):
        describe_base(SimpleNamespace(to_dict=dict), name="not a language model")
