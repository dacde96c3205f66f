"""A user's mistake is one sentence: what was given, what is allowed, what to do. And what is left to transformers."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from refusals import refusal

import accel

OPTIONS = {
    "unknown option": ({"draft_len": 3}, "draft_length"),
    "unknown method": ({"method": "speculate"}, "speculative"),
    "unknown drafter": ({"drafter": "llm"}, "ngram"),
    "unknown acceptance": ({"acceptance": "all"}, "block"),
    "no length": ({"draft_length": 0}, "method='plain'"),
    "half a length": ({"draft_length": 2.5}, "whole number"),
    "length as a word": ({"draft_length": "three"}, "auto"),
    "too long": ({"draft_length": 1000}, "64"),
    "lenience of zero": ({"lenience": ("lin", 0.0)}, "(0, 1]"),
    "lenience above one": ({"lenience": ("lin", 1.5)}, "(0, 1]"),
    "lenience of a kind": ({"lenience": ("cubic", 0.5)}, "sq"),
    "lenience alone": ({"lenience": 0.5}, "rule"),
    "lenience by block": ({"lenience": ("lin", 0.5), "acceptance": "block"}, "token"),
    "seed": ({"seed": -1}, "whole number"),
    "linear layers": ({"cpu_linear": "fast"}, "packed"),
    "lm without a draft": ({"drafter": "lm"}, "draft model"),
    "cascade without a draft": ({"drafter": "cascade"}, "draft model"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tiny, case):
    options, hint = OPTIONS[case]
    model = tiny.build("llama")
    assert hint in refusal(lambda: accel.attach(model, **options))
    assert "generate" not in vars(model)


def test_unknown_option_of_one_call(tiny):
    model, _ = tiny.pair("llama")
    with pytest.raises(ValueError, match="draft_len"):
        accel.generate(model, **tiny.prompts(1), draft_len=3)


@pytest.mark.parametrize("method", ["plain", "speculative"])
def test_artifacts_that_do_not_fit(tiny, method):
    model, draft = tiny.pair("llama")
    other = tiny.build("llama", vocab_size=80)
    if method == "plain":
        assert "speculative" in refusal(lambda: accel.generate(model, artifacts=[draft], method="plain"))
        return
    assert "80" in (said := refusal(lambda: accel.generate(model, artifacts=[other]))) and "67" in said
    assert "2 artifacts" in refusal(lambda: accel.generate(model, artifacts=[draft, draft]))
    assert "target itself" in refusal(lambda: accel.generate(model, artifacts=[model]))
    assert "int" in refusal(lambda: accel.generate(model, artifacts=[3]))
    assert "nowhere" in refusal(lambda: accel.generate(model, artifacts=["./nowhere"]))
    assert "generate" not in vars(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"format": 1, "kind": "draft"})])
def test_a_corrupt_manifest(tiny, tmp_path, content):
    model, _ = tiny.pair("llama")
    (tmp_path / "accel.json").write_text(content)
    assert refusal(lambda: accel.generate(model, artifacts=[tmp_path], **tiny.prompts(1)))


@pytest.mark.parametrize("way", [{"method": "plain"}, {"drafter": "suffix"}])
def test_prompts(tiny, way):
    model, _ = tiny.pair("llama")

    def call(ids, **kwargs):
        return accel.generate(model, torch.as_tensor(ids), **way, **{"max_new_tokens": 4, **kwargs})

    assert "empty prompt" in refusal(lambda: call(torch.zeros(1, 0, dtype=torch.long)))
    assert "empty batch" in refusal(lambda: call(torch.zeros(0, 4, dtype=torch.long)))
    mask = torch.tensor([[1, 1], [0, 0]])
    assert "row 1" in refusal(lambda: call([[5, 6], [0, 0]], attention_mask=mask))
    assert "256" in (said := refusal(lambda: call([[5] * 257]))) and "257" in said


@pytest.mark.parametrize("way", [{"method": "plain"}, {"drafter": "suffix"}])
def test_learned_positions_run_out(tiny, way):
    model = tiny.build("gpt2", max_position_embeddings=16, n_positions=16)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])}
    assert "at most 9" in refusal(lambda: accel.generate(model, **inputs, **way, max_new_tokens=10))
    theirs = tiny.reference(model, **inputs, max_new_tokens=9, eos_token_id=66)
    ours = accel.generate(model, **inputs, **way, max_new_tokens=9, eos_token_id=66)
    tiny.assert_similar(ours, theirs)


def test_stop_strings_need_a_tokenizer(tiny):
    model, _ = tiny.pair("llama")
    assert "tokenizer" in refusal(lambda: accel.generate(model, **tiny.prompts(1), stop_strings=["a"]))


def test_beams_with_a_draft(tiny):
    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(1) | {"num_beams": 4, "max_new_tokens": 4}
    for options in ({"artifacts": [draft]}, {"drafter": "suffix"}, {"assistant_model": draft}):
        assert "num_beams=4" in refusal(lambda options=options: accel.generate(model, **inputs, **options))


def inputs_embeds(model, inputs):
    return {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }


# what accel does not do itself → the words that the note must hold
LEFT_TO_TRANSFORMERS = {
    "beam search": (lambda m, i: i | {"num_beams": 3}, "beam search"),
    "beam sample": (lambda m, i: i | {"num_beams": 2, "do_sample": True}, "beam sample"),
    "no cache": (lambda m, i: i | {"use_cache": False}, "use_cache"),
    "attentions": (lambda m, i: i | {"return_dict_in_generate": True, "output_attentions": True}, "attentions"),
    "hidden": (lambda m, i: i | {"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
    "embeddings": (inputs_embeds, "inputs_embeds"),
    "negative prompt": (
        lambda m, i: i | {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6]] * 2)},
        "negative_prompt_ids",
    ),
    "right padding": (lambda m, i: {k: v.flip(1) for k, v in i.items()}, "padding"),
    "gaps": (lambda m, i: i | {"attention_mask": torch.tensor([[1, 1, 0] * 3] * 2)}, "gaps"),
    "positions": (lambda m, i: i | {"position_ids": torch.arange(9).expand(2, 9) * 2}, "position_ids"),
}


@pytest.mark.parametrize("case", LEFT_TO_TRANSFORMERS)
def test_left_to_transformers_with_a_note(tiny, case, caplog):
    make, words = LEFT_TO_TRANSFORMERS[case]
    model, _ = tiny.pair("llama")
    inputs = make(model, tiny.prompts(2)) | {"max_new_tokens": 6}
    torch.manual_seed(0)
    theirs = type(model).generate(model, **inputs)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "accel"):
        ours = accel.generate(model, **inputs)
    stats = accel.stats(model)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert torch.equal(ours.sequences, theirs.sequences) and ours.keys() == theirs.keys()
    assert stats.method == "transformers"
    assert len(stats.notes) == 1 and words in stats.notes[0] and stats.notes[0] in caplog.text


def test_a_cache_of_the_callers_own_is_filled(tiny):
    from transformers import DynamicCache

    model, _ = tiny.pair("llama")
    inputs, cache = tiny.prompts(1) | {"max_new_tokens": 5}, DynamicCache()
    first = accel.generate(model, **inputs, past_key_values=cache)
    assert cache.get_seq_length() == 9 + 4
    more = accel.generate(model, first, past_key_values=cache, max_new_tokens=5)
    tiny.assert_similar(more, tiny.reference(model, first, max_new_tokens=5))
    assert "past_key_values" in accel.stats(model).notes[0]


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_settings_without_effect_are_named(tiny, setting):
    model, _ = tiny.pair("llama")
    prompt = tiny.prompts(2) | {"max_new_tokens": 6}
    ours = accel.generate(model, **prompt, **setting)
    assert torch.equal(ours, accel.generate(model, **prompt))
    accel.generate(model, **prompt, **setting)
    assert [note for note in accel.stats(model).notes if next(iter(setting)) in note]
