"""Masked-diffusion models through generate(), load() and the command line: what comes out, and what is counted."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner
from diffusion_models import (
    DREAM,
    DREAM_FACTS,
    LLADA,
    LLADA_FACTS,
    MASK,
    dream_logits,
    dream_tensors,
    llada_logits,
    llada_tensors,
    write_checkpoint,
)
from masked_loop import one_by_one
from refusals import refusal
from transformers import AutoConfig, AutoModelForMaskedLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

import accel
from accel.cli.main import main
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.models.diffusion import CONFIG_KEY, DiffusionFacts, set_facts

HIDDEN = 66  # the mask of the tiny causal family below: its last token
NEW = 12


@pytest.fixture
def model(tiny):
    """A causal family read without causality; fp64, so that no sum's order decides about a token."""
    made = tiny.build("llama", peak=1.3).double()
    set_facts(made, DiffusionFacts(mask_token=HIDDEN, block_length=4, threshold=0.8, pad_token=0))
    return made


class Columns(BaseStreamer):
    def __init__(self) -> None:
        self.values, self.ended = [], 0

    def put(self, value) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


FAMILIES = {
    # with thresholds that some of the random weights' entropies pass
    "llada": (LLADA, LLADA_FACTS, llada_tensors, llada_logits, 2.6),
    "dream": (DREAM, DREAM_FACTS, dream_tensors, dream_logits, 3.2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_checkpoints_decode_as_the_published_loop_does(tmp_path, family) -> None:
    """From a folder under the published names to the tokens and forwards that the equations and the loop give."""
    config, facts, tensors, logits, threshold = FAMILIES[family]
    weights = tensors()
    folder = write_checkpoint(tmp_path, config | {CONFIG_KEY: facts | {"threshold": threshold}}, weights)
    loaded = accel.load(str(folder), dtype="float64")
    weights = {name: tensor.double() for name, tensor in weights.items()}
    plan = {"mask": MASK, "block": 8, "rule": "entropy", "threshold": threshold, "strict": facts.get("strict", False)}
    for prompt in ([5, 6, 7], [11, 3, 60, 23, 42]):
        expected, forwards = one_by_one(lambda row: logits(weights, row, config), prompt, 16, **plan)
        out = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=16, eos_token_id=-1)
        assert out[0, len(prompt) :].tolist() == expected
        assert 2 < forwards < 16 and loaded.stats.target_calls == forwards
        assert loaded.stats.method == "dparallel" and not loaded.stats.lossless


def test_a_padded_batch_is_its_rows_alone(tiny, model) -> None:
    inputs = tiny.prompts(4, vocab=HIDDEN)
    accel.attach(model)
    together = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    stats = together.accel
    assert stats is accel.stats(model) and stats.method == "dparallel"
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        rows.append(model.generate(ids[mask.bool()][None], max_new_tokens=NEW)[0, int(mask.sum()) :])
        assert accel.stats(model).target_calls <= stats.target_calls
    width = inputs["input_ids"].shape[1]
    for new, alone in zip(together.sequences[:, width:], rows, strict=True):
        assert new[: len(alone)].tolist() == alone.tolist() and not new[len(alone) :].any()
    assert torch.equal(together.sequences[:, :width], inputs["input_ids"])
    assert stats.prompt_tokens == int(inputs["attention_mask"].sum())
    assert stats.generated_tokens == sum(len(row) for row in rows)
    assert stats.tokens_per_forward == stats.generated_tokens / stats.target_calls > 1
    assert set(stats.seconds) == {"decode"}


def test_the_end_of_the_text(tiny, model) -> None:
    """Padding and what follows the end is neither text nor counted; the facts say what ends it."""
    inputs = tiny.prompts(3, vocab=HIDDEN)
    accel.attach(model)
    whole = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=-1)[:, 9:]
    assert accel.stats(model).generated_tokens == 3 * NEW
    full = accel.stats(model).row_calls
    end = int(whole[0, 5])
    set_facts(model, DiffusionFacts(mask_token=HIDDEN, block_length=4, threshold=0.8, pad_token=0, stop_tokens=(end,)))
    accel.attach(model)
    early = model.generate(**inputs, max_new_tokens=NEW)[:, 9:]
    stats = accel.stats(model)
    for new, all_of_it in zip(early.tolist(), whole.tolist(), strict=True):
        text = all_of_it[: all_of_it.index(end) + 1] if end in all_of_it else all_of_it
        assert new == text + [0] * (len(new) - len(text))
    assert stats.generated_tokens < 3 * NEW and stats.row_calls < full
    late = accel.generate(model, **inputs, max_new_tokens=NEW, early_stop=False)[:, 9:]
    assert torch.equal(late, early)
    assert accel.stats(model).generated_tokens == stats.generated_tokens


@pytest.mark.parametrize("padded", [False, True])
def test_infilling(tiny, model, padded) -> None:
    prompts = tiny.prompts(2 if padded else 1, vocab=HIDDEN)
    ids = prompts["input_ids"].clone()
    ids[-1, 4], ids[-1, 6:8] = HIDDEN, HIDDEN
    accel.attach(model)
    streamer = None if padded else Columns()
    out = model.generate(**prompts | {"input_ids": ids}, max_new_tokens=4, streamer=streamer)
    filled = out[-1, :9]
    assert HIDDEN not in out and torch.equal(filled[ids[-1] != HIDDEN], ids[-1][ids[-1] != HIDDEN])
    assert torch.equal(out[:-1, :9], ids[:-1])
    stats = accel.stats(model)
    # what was written into the prompt counts as generated
    assert stats.generated_tokens == 4 * len(ids) + 3 - int((out[:, 9:] == 0).sum())
    again = model.generate(**prompts | {"input_ids": out[:, :9]}, max_new_tokens=4)
    assert torch.equal(again, out)
    if streamer is not None:
        assert [column for value in streamer.values[1:] for column in value] == out[0, 9:].tolist()


def test_streaming(tiny, model) -> None:
    accel.attach(model, threshold=-1)
    streamer, inputs = Columns(), tiny.prompts(1, vocab=HIDDEN)
    out = model.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
    assert [value for column in streamer.values[1:] for value in column] == out[0, 9:].tolist() and streamer.ended == 1
    assert accel.stats(model).target_calls == accel.stats(model).generated_tokens


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches(tiny, model, cache) -> None:
    inputs = tiny.prompts(3, vocab=HIDDEN) | {"max_new_tokens": NEW, "eos_token_id": -1}
    # one forward a block reads nothing twice: nothing is approximated
    exact = accel.generate(model, **inputs, threshold=math.inf)
    assert torch.equal(accel.generate(model, **inputs, threshold=math.inf, cache=cache), exact)
    assert accel.stats(model).target_calls == 3
    accel.attach(model, cache=cache)
    together = model.generate(**inputs)
    stats = accel.stats(model)
    assert stats.state_bytes > 0 and any(cache in note and "approximate" in note for note in stats.notes)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        alone = model.generate(ids[mask.bool()][None], max_new_tokens=NEW, eos_token_id=-1)
        assert alone[0, int(mask.sum()) :].tolist() == together[row, 9:].tolist()


def test_sampling(tiny, model) -> None:
    inputs = tiny.prompts(2, vocab=HIDDEN) | {"max_new_tokens": NEW, "do_sample": True, "eos_token_id": -1}
    accel.attach(model)
    warped = inputs | {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model.generate(**warped))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert HIDDEN not in outs[0]
    # where one token is left, it is certain: the likeliest ones, a block at a time
    one = model.generate(**inputs, top_k=1)
    assert accel.stats(model).target_calls == 3
    assert torch.equal(one, accel.generate(model, **inputs | {"do_sample": False}, threshold=math.inf))
    alone = inputs | {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    three = model.generate(**alone, num_return_sequences=3)
    assert len({tuple(row) for row in three.tolist()}) == 3


def test_one_off_calls_and_detaching(tiny, model) -> None:
    inputs = tiny.prompts(1, vocab=HIDDEN) | {"max_new_tokens": NEW}
    before = dict(vars(model))
    once = accel.generate(model, **inputs, threshold=1.2, block_length=6)
    assert accel.stats(model).method == "dparallel" and vars(model) == before
    accel.attach(model, method="dparallel", threshold=1.2, block_length=6)
    assert torch.equal(model.generate(**inputs), once)
    assert torch.equal(model.generate(**inputs, use_cache=False), once)
    accel.detach(model)
    assert vars(model) == before


def test_other_families(tiny) -> None:
    """Learned positions, and a class that is bidirectional by itself."""
    gpt2 = tiny.build("gpt2").double()
    set_facts(gpt2, DiffusionFacts(mask_token=HIDDEN, block_length=4))
    assert HIDDEN not in accel.generate(gpt2, **tiny.prompts(2, vocab=HIDDEN), max_new_tokens=8)
    assert "256 positions" in refusal(lambda: accel.generate(gpt2, **tiny.prompts(1, vocab=HIDDEN), max_new_tokens=250))


@pytest.fixture
def masked_lm(tmp_path):
    """The folder of a tiny BERT with facts, a byte tokenizer and no chat template."""
    config = AutoConfig.for_model(
        "bert", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.4, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForMaskedLM.from_config(config).eval()
    set_facts(made, DiffusionFacts(mask_token=299, block_length=4, stop_tokens=(0,), pad_token=0))
    made.save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_masked_lm_from_its_folder(masked_lm) -> None:
    loaded = accel.load(str(masked_lm))
    ids = torch.tensor([[5, 6, 299, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    out = loaded.model.generate(**inputs, max_new_tokens=8)
    assert 299 not in out and loaded.stats.method == "dparallel"
    assert isinstance(loaded.generate("abc", max_new_tokens=8), str)
    pieces = list(loaded.stream("abc", max_new_tokens=8))
    assert "".join(pieces) == loaded.generate("abc", max_new_tokens=8)
    assert "cache='none'" in refusal(lambda: accel.load(str(masked_lm), cache="dual").generate("abc", max_new_tokens=8))
    assert "64 positions" in refusal(lambda: loaded.generate("abc", max_new_tokens=64))


def test_the_command_line(masked_lm) -> None:
    def run(*arguments):
        return CliRunner().invoke(main, ["generate", "-m", str(masked_lm), "ab", "--max-new-tokens", "8", *arguments])

    said = json.loads(run("--json").stdout)
    assert said["stats"]["method"] == "dparallel" and said["stats"]["target_calls"] >= 1
    summary = run("-o", "threshold=inf", "-o", "early_stop=false", "--stats")
    assert summary.exit_code == 0 and "(2 forwards)" in summary.stderr and "τ" not in summary.stderr
    assert (
        json.loads(run("--json", "--raw", "--temperature", "2", "--top-k", "9", "--seed", "3").stdout)["text"]
        == (json.loads(run("--json", "--temperature", "2", "--top-k", "9", "--seed", "3").stdout)["text"])
    )
    wrong = run("--method", "speculative")
    assert wrong.exit_code != 0 and "masked-diffusion" in wrong.stderr and wrong.stderr.count("\n") == 1
    assert "options" in (listed := CliRunner().invoke(main, ["methods"]).stdout) and "block_length" in listed


def test_facts_travel_with_the_model(tiny, model, tmp_path) -> None:
    inputs = tiny.prompts(2, vocab=HIDDEN) | {"max_new_tokens": NEW}
    expected = accel.generate(model, **inputs)
    model.save_pretrained(tmp_path)
    again = accel.load(str(tmp_path), dtype="float64")
    assert torch.equal(again.model.generate(**inputs), expected) and again.stats.method == "dparallel"


def test_a_causal_model_is_no_masked_one(tiny) -> None:
    causal, _ = tiny.pair("llama")
    said = refusal(lambda: accel.attach(causal, method="dparallel"))
    assert "accel_diffusion" in said and "speculative" in said
    assert "accel_diffusion" in refusal(
        lambda: accel.generate(causal, **tiny.prompts(1, vocab=HIDDEN), method="dparallel")
    )
    assert "generate" not in vars(causal)


ATTACHED = {
    "plain": ({"method": "plain"}, "dparallel"),
    "speculative": ({"method": "speculative"}, "left to right"),
    "an option of another method": ({"drafter": "ngram"}, "block_length"),
    "a rule without its threshold": ({"rule": "confidence"}, "0.9"),
    "an unknown cache": ({"cache": "triple"}, "prefix"),
}


@pytest.mark.parametrize("case", ATTACHED)
def test_attachments_that_are_refused(model, case) -> None:
    options, hint = ATTACHED[case]
    assert hint in refusal(lambda: accel.attach(model, **options))
    assert "generate" not in vars(model)


def test_drafts_and_wrong_facts_are_refused(tiny, model) -> None:
    assert "a draft" in refusal(lambda: accel.attach(model, tiny.build("llama", seed=3)))
    assert "cartridge" in refusal(lambda: accel.attach(model, method="cartridge"))
    wrong = copy.deepcopy(model)
    setattr(wrong.config, CONFIG_KEY, {"mask_token": 67})
    assert "67 tokens" in refusal(lambda: accel.attach(wrong))


def test_cartridges_are_refused(tiny, model) -> None:
    """Even one of the same weights, read causally: its config has the same digest."""
    model, causal, ids = model.float(), tiny.build("llama", peak=1.3), list(range(3, 15))
    described = (document.describe("text", len(ids)),)
    cartridge = Cartridge.of("doc", document.read(causal, ids), causal, method="whole", exact=True, documents=described)
    assert "a cartridge" in refusal(lambda: accel.attach(model, cartridge))
    inputs = tiny.prompts(1, vocab=HIDDEN) | {"max_new_tokens": NEW}
    accel.attach(model)
    before = model.generate(**inputs)
    assert "a cartridge" in refusal(lambda: model.generate(**inputs, cartridges=[cartridge]))
    assert torch.equal(model.generate(**inputs, cartridges=[]), before)


class Mine(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


CALLS = {
    "beams": ({"num_beams": 2}, "beam search"),
    "a draft for the call": ({"assistant_model": "draft"}, "assistant_model"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "logits": ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "attentions"),
    "a penalty": ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    "a least length": ({"min_new_tokens": 3}, "MinLengthLogitsProcessor"),
    "a processor": ({"logits_processor": LogitsProcessorList([Mine()])}, "Mine"),
    "a block that does not divide": ({"block_length": 5}, "10 or 15"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_are_refused(tiny, model, case) -> None:
    changes, hint = CALLS[case]
    changes = {name: tiny.build("llama", seed=3) if value == "draft" else value for name, value in changes.items()}
    inputs = tiny.prompts(1, vocab=HIDDEN) | {"max_new_tokens": NEW}
    before = accel.generate(model, **inputs)
    assert hint in refusal(lambda: accel.generate(model, **inputs, **changes))
    # and the next call is none the worse
    assert torch.equal(accel.generate(model, **inputs), before)


def test_rows_that_would_have_to_stay_in_step_are_refused(tiny, model) -> None:
    inputs = tiny.prompts(2, vocab=HIDDEN) | {"max_new_tokens": NEW, "logits_processor": LogitsProcessorList([Mine()])}
    assert "own pace" in refusal(lambda: accel.generate(model, **inputs))


def test_right_padding_is_refused(tiny, model) -> None:
    inputs = tiny.prompts(2, vocab=HIDDEN)
    flipped = {name: value.flip(1) for name, value in inputs.items()}
    assert "padding" in refusal(lambda: accel.generate(model, **flipped, max_new_tokens=NEW))
