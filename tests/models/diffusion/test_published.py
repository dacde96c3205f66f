"""LLaDA, Dream, a2d and masked-LM folders: logits as their equations say, and one line for what is not theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import (
    DREAM,
    DREAM_FACTS,
    LLADA,
    LLADA_FACTS,
    MASK,
    STOP,
    VOCAB,
    dream_logits,
    dream_tensors,
    llada_logits,
    llada_tensors,
    rms_ratio,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationMixin,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from accel.errors import AccelError
from accel.models.diffusion import CONFIG_KEY, Denoiser, DiffusionFacts, facts_of, set_facts
from accel.models.loading import load_model

LLADA_HERE = LLADA | {CONFIG_KEY: LLADA_FACTS}
DREAM_HERE = DREAM | {CONFIG_KEY: DREAM_FACTS}


def rows(*lengths: int, seed: int = 5) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = [torch.randint(3, VOCAB - 1, (length,), generator=g) for length in lengths]
    for row in out:
        row[::3] = MASK
    return out


def load(folder: Path) -> Any:
    return load_model(folder, device="cpu")[0]


def refusal(folder: Path) -> str:
    with pytest.raises(AccelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_llada_says_what_its_equations_say(tmp_path: Path, shards: int) -> None:
    tensors = llada_tensors()
    model = load(write_checkpoint(tmp_path / "llada", LLADA_HERE, tensors, shards))
    assert type(model) is LlamaForCausalLM
    facts = facts_of(model)
    assert facts is not None and facts.mask_token == MASK and facts.block_length == 8
    batch = rows(9, 5, 1, 12)
    ours = Denoiser(model, facts).logits(batch, [torch.arange(len(row)) for row in batch])
    for row, logits in zip(batch, ours, strict=True):
        assert rms_ratio(logits, llada_logits(tensors, row)) <= 1e-5


def test_dream_says_what_its_equations_say_and_is_unshifted(tmp_path: Path) -> None:
    tensors = dream_tensors()
    model = load(write_checkpoint(tmp_path / "dream", DREAM_HERE, tensors, shards=2))
    assert type(model) is Qwen2ForCausalLM
    facts = facts_of(model)
    assert facts is not None and facts.shift and facts.strict
    batch = rows(7, 11, 2)
    at = [torch.tensor([0, 1, 6]), torch.tensor([10, 3]), torch.tensor([1])]
    for row, asked, logits in zip(batch, at, Denoiser(model, facts).logits(batch, at), strict=True):
        assert rms_ratio(logits, dream_logits(tensors, row)[asked]) <= 1e-5


def test_shared_key_heads_and_a_tied_head(tmp_path: Path) -> None:
    config = LLADA_HERE | {"n_kv_heads": 2, "weight_tying": True}
    tensors = llada_tensors(n_kv_heads=2)
    del tensors["model.transformer.ff_out.weight"]
    model = load(write_checkpoint(tmp_path / "tied", config, tensors))
    (row,) = rows(8)
    (logits,) = Denoiser(model, facts_of(model)).logits([row], [torch.arange(8)])
    assert rms_ratio(logits, llada_logits(tensors, row, config)) <= 1e-5


def test_illada_has_llamas_names(tmp_path: Path) -> None:
    theirs = load(write_checkpoint(tmp_path / "llada", LLADA_HERE, llada_tensors()))
    config = {
        "model_type": "illada",
        "architectures": ["ILLaDAForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "layer_norm_eps": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        CONFIG_KEY: LLADA_FACTS,
    }
    model = load(write_checkpoint(tmp_path / "illada", config, theirs.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    ids = torch.arange(6)[None]
    assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a2d_is_its_family(tmp_path: Path) -> None:
    causal = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    ).eval()
    causal.save_pretrained(tmp_path / "a2d")
    path = tmp_path / "a2d" / "config.json"
    raw = json.loads(path.read_text()) | {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
    path.write_text(json.dumps(raw))
    assert CONFIG_KEY in refusal(tmp_path / "a2d")
    path.write_text(json.dumps(raw | {CONFIG_KEY: LLADA_FACTS}))
    model = load(tmp_path / "a2d")
    assert type(model) is Qwen3ForCausalLM and facts_of(model) is not None
    assert torch.equal(model(torch.arange(5)[None]).logits, causal(torch.arange(5)[None]).logits)
    path.write_text(json.dumps(raw | {"model_type": "a2d-nobodys", CONFIG_KEY: LLADA_FACTS}))
    assert "'nobodys'" in refusal(tmp_path / "a2d")


def test_saved_models_are_loaded_again_as_what_they_are(tmp_path: Path) -> None:
    first = load(write_checkpoint(tmp_path / "dream", DREAM_HERE, dream_tensors()))
    first.save_pretrained(tmp_path / "ours")
    # the folder is a plain one of the class that it became
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "qwen2" and "model.layers.0.mlp.up_proj.weight" in load_file(
        tmp_path / "ours" / "model.safetensors"
    )
    second = load(tmp_path / "ours")
    assert facts_of(second) == facts_of(first) == DiffusionFacts.parse(DREAM_FACTS)
    assert second.generation_config.eos_token_id == [STOP]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
    )
    return BertForMaskedLM(config).eval()


def test_a_masked_lm_gains_generate_and_keeps_its_class(tmp_path: Path, bert: BertForMaskedLM) -> None:
    model = copy.deepcopy(bert)
    model.save_pretrained(tmp_path / "plain")
    assert CONFIG_KEY in refusal(tmp_path / "plain")
    set_facts(model, DiffusionFacts(mask_token=MASK, stop_tokens=(STOP,)))
    model.save_pretrained(tmp_path / "masked")
    loaded = load(tmp_path / "masked")
    assert isinstance(loaded, BertForMaskedLM) and isinstance(loaded, GenerationMixin) and loaded.can_generate()
    assert loaded.generation_config.eos_token_id == [STOP]
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert facts_of(again) == facts_of(loaded) and again.config.architectures == ["BertForMaskedLM"]
    assert isinstance(copy.deepcopy(again), GenerationMixin)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, bert(ids).logits)


def test_a_tokenizer_of_a_family_without_a_class(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # LLaDA: tokenizer.json; the config's model_type is one that AutoTokenizer does not know
    llada = write_checkpoint(tmp_path / "llada", LLADA_HERE, llada_tensors())
    backend = Tokenizer(BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(llada)
    _, tokenizer = load_model(llada, device="cpu")
    assert tokenizer("ab")["input_ids"] == [3]
    # Dream: vocab.json and merges.txt, and a tokenizer class of its own in auto_map
    dream = write_checkpoint(tmp_path / "dream", DREAM_HERE, dream_tensors())
    (dream / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (dream / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {"content": "<|mask|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    (dream / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": {"4": special},
                "mask_token": "<|mask|>",
                "unk_token": None,
                "eos_token": "<|endoftext|>",
                "chat_template": "{{ messages[0]['content'] }}",
            }
        )
    )
    _, tokenizer = load_model(dream, device="cpu")
    assert tokenizer("ab<|mask|>")["input_ids"] == [2, 4] and tokenizer.mask_token_id == 4
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize(
    "change",
    [
        {"block_type": "sequential"},
        {"activation_type": "swiglu"},
        {"layer_norm_type": "default"},
        {"alibi": True},
        {"rope": False},
        {"include_qkv_bias": True},
        {"scale_logits": True},
        {"attention_layer_norm": True},
        {"n_layers": "two"},
        {"d_model": None},
    ],
)
def test_a_llada_that_is_no_llama_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "other", LLADA_HERE | change, llada_tensors())
    assert next(iter(change)) in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"use_sliding_window": True}, {"use_mrope": True}, {"block_size": 32}, {"rope_scaling": {"type": "yarn"}}],
)
def test_a_dream_that_is_no_qwen2_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "other", DREAM_HERE | change, dream_tensors())
    assert next(iter(change)) in refusal(folder)


def test_an_absent_field_means_what_its_class_means_by_it(tmp_path: Path) -> None:
    config = {key: value for key, value in LLADA_HERE.items() if key != "activation_type"}
    assert "'swiglu'" in refusal(write_checkpoint(tmp_path / "absent", config, llada_tensors()))


def test_unknown_checkpoints_and_wrong_facts_are_refused(tmp_path: Path) -> None:
    tensors = llada_tensors()
    unknown = refusal(write_checkpoint(tmp_path / "unknown", LLADA, tensors))
    assert f'"{CONFIG_KEY}"' in unknown and "config.json" in unknown
    other = LLADA | {CONFIG_KEY: LLADA_FACTS | {"mask_token": 3}}
    message = refusal(write_checkpoint(tmp_path / "other", other, tensors))
    assert "mask_token 3" in message and f"mask_token_id is {MASK}" in message
    outside = {key: v for key, v in LLADA.items() if key != "mask_token_id"}
    outside |= {CONFIG_KEY: LLADA_FACTS | {"mask_token": VOCAB}}
    assert f"{VOCAB} tokens" in refusal(write_checkpoint(tmp_path / "outside", outside, tensors))


def test_facts_of_a_plain_causal_folder_are_checked_when_it_is_loaded(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "llada", LLADA_HERE, llada_tensors()))
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    raw = json.loads(path.read_text())
    raw[CONFIG_KEY]["mask_token"] = 5000
    path.write_text(json.dumps(raw))
    assert "5000" in refusal(tmp_path / "ours")
    raw[CONFIG_KEY] = {"mask": 1}
    path.write_text(json.dumps(raw))
    assert "mask_token" in refusal(tmp_path / "ours")


def test_no_tensor_is_left_out_and_none_made_up(tmp_path: Path) -> None:
    tensors = llada_tensors()
    missing = {name: t for name, t in tensors.items() if "blocks.1.ff_out" not in name}
    assert "missing" in refusal(write_checkpoint(tmp_path / "missing", LLADA_HERE, missing))
    strange = tensors | {"model.transformer.blocks.0.q_norm.weight": torch.ones(8)}
    assert "q_norm" in refusal(write_checkpoint(tmp_path / "strange", LLADA_HERE, strange))
    more = tensors | {"model.transformer.blocks.2.q_proj.weight": torch.ones(32, 32)}
    assert "not of the model" in refusal(write_checkpoint(tmp_path / "more", LLADA_HERE, more))
    shape = tensors | {"model.transformer.blocks.0.q_proj.weight": torch.ones(16, 32)}
    refusal(write_checkpoint(tmp_path / "shape", LLADA_HERE, shape))
    untied = LLADA_HERE | {"weight_tying": True}
    assert "ties the head" in refusal(write_checkpoint(tmp_path / "untied", untied, tensors))


def test_files_that_are_not_there_or_not_of_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "none", LLADA_HERE, llada_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors only" in refusal(folder)
    folder = write_checkpoint(tmp_path / "outside", LLADA_HERE, llada_tensors(), shards=2)
    save_file(llada_tensors(), tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    assert "outside" in refusal(folder)
    index.write_text("[]")
    assert "no index" in refusal(folder) or "not an index" in refusal(folder)


def test_types(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in llada_tensors().items()}
    folder = write_checkpoint(tmp_path / "half", LLADA_HERE, tensors)
    assert load_model(folder, device="cpu")[0].dtype is torch.float32
    assert load_model(folder, device="cpu", dtype="bf16")[0].dtype is torch.bfloat16
