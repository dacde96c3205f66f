"""accel.generate() in the place of transformers' generate(): every family, every drafter, every setting.

Greedy output is compared by transformers' own similarity rule (``tiny.assert_similar``). Sampled output cannot be, so
the scores it was drawn from are: they must be what transformers' processors make of the same tokens.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.generation import BaseStreamer, LogitsProcessor, StoppingCriteria

import accel

FAMILIES = "llama qwen2 qwen3 mistral gemma3_text gpt2 gpt_neox phi3 olmo2 falcon bloom".split()
# ways to decode → (whether there is a draft model, options)
WAYS = {
    "plain": (False, {"method": "plain"}),
    "lm": (True, {"drafter": "lm", "draft_length": 3}),
    "lm-auto": (True, {"drafter": "lm"}),
    "cascade": (True, {"drafter": "cascade"}),
    "suffix": (False, {"drafter": "suffix", "draft_length": 3}),
    "ngram": (False, {"drafter": "ngram", "draft_length": 3}),
}
NEW = 12


@pytest.fixture(scope="module")
def greedy(tiny):
    """The first row's new tokens where nothing interferes: what settings are aimed at."""
    model, _ = tiny.pair("llama")
    return tiny.reference(model, **tiny.prompts(2), max_new_tokens=NEW).sequences[0, 9:].tolist()


def decode(model, draft, way, **kwargs):
    """Ours, with the promise that it was ours: no fallback."""
    with_draft, options = WAYS[way]
    out = accel.generate(model, artifacts=[draft] if with_draft else [], **options, **kwargs)
    assert accel.stats(model).method in ("plain", "speculative"), accel.stats(model).notes
    return out


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_transformers_does(tiny, family, batch):
    model, draft = tiny.pair(family)
    inputs = tiny.prompts(batch) | {"max_new_tokens": NEW}
    theirs = tiny.reference(model, **inputs)
    tiny.assert_similar(decode(model, None, "plain", **inputs), theirs)
    tiny.assert_similar(decode(model, draft, "lm", **inputs), theirs)
    stats = accel.stats(model)
    assert stats.lossless and not stats.notes
    if batch > 1:
        assert 0 < stats.accepted_tokens < stats.drafted_tokens, "the draft must be right in part"


@pytest.mark.parametrize("kind", ["right", "partly", "wrong"])
@pytest.mark.parametrize("way", WAYS)
def test_any_draft_leaves_the_output_as_it_is(tiny, way, kind):
    model, draft = tiny.pair("llama", kind)
    inputs = tiny.prompts(4) | {"max_new_tokens": 2 * NEW}
    theirs = tiny.reference(model, **inputs)
    out = decode(model, draft, way, **inputs, return_dict_in_generate=True, output_scores=True)
    tiny.assert_similar(out.sequences, theirs, out.scores)
    stats = out.accel
    if way == "lm":
        kept = stats.accepted_tokens / stats.drafted_tokens
        # tokens behind a row's end were accepted and then discarded
        low, high = {"right": (0.8, 1.0), "partly": (0.05, 0.8), "wrong": (0.0, 0.05)}[kind]
        assert low <= kept <= high


# setting → kwargs made from the tokens g that would come without it; each must change what transformers says
KNOBS = {
    "max_new_tokens": lambda g: {"max_new_tokens": 5},
    "max_length": lambda g: {"max_new_tokens": None, "max_length": 15},
    "eos": lambda g: {"eos_token_id": g[3]},
    "eos list": lambda g: {"eos_token_id": [g[5], g[2]]},
    "min_length": lambda g: {"eos_token_id": g[2], "min_length": 15},
    "min_new_tokens": lambda g: {"eos_token_id": g[2], "min_new_tokens": 6},
    "repetition_penalty": lambda g: {"repetition_penalty": 1.9},
    "no_repeat_ngram_size": lambda g: {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": lambda g: {"encoder_repetition_penalty": 2.5},
    "encoder_no_repeat_ngram_size": lambda g: {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": lambda g: {"bad_words_ids": [[g[2]], [g[0], g[1]]]},
    "sequence_bias": lambda g: {"sequence_bias": [[[g[4]], -20.0], [[g[0], g[1]], -20.0]]},
    "suppress_tokens": lambda g: {"suppress_tokens": [g[1], g[4]]},
    "begin_suppress_tokens": lambda g: {"begin_suppress_tokens": [g[0]]},
    "forced_eos_token_id": lambda g: {"forced_eos_token_id": 2},
    "exponential_decay": lambda g: {"exponential_decay_length_penalty": (3, 2.0)},
    "guidance_scale": lambda g: {"guidance_scale": 2.0},
    "watermarking_config": lambda g: {"watermarking_config": {"bias": 5.0}},
    "prefix_allowed_tokens_fn": lambda g: {
        "prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 7, int(ids[-1]) // 2]
    },
    "max_time": lambda g: {"max_time": 1e-9},
    "generation_config": lambda g: {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(max_new_tokens=7, repetition_penalty=1.5, eos_token_id=2, pad_token_id=0),
    },
}
# settings that leave a healthy model's greedy output alone
QUIET_KNOBS = {
    "remove_invalid_values": lambda g: {"remove_invalid_values": True},
    "renormalize_logits": lambda g: {"renormalize_logits": True},
    # inferred from the padding tokens
    "no attention mask": lambda g: {"attention_mask": None},
    "logits_to_keep": lambda g: {"logits_to_keep": 1},
    "cache_implementation": lambda g: {"cache_implementation": "static"},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("knob", KNOBS | QUIET_KNOBS)
def test_every_setting_is_honoured(tiny, greedy, knob, batch):
    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(batch) | {"max_new_tokens": NEW} | (KNOBS | QUIET_KNOBS)[knob](greedy)
    theirs = tiny.reference(model, **inputs)
    if knob in KNOBS and batch > 1:
        without = tiny.reference(model, **tiny.prompts(batch), max_new_tokens=NEW).sequences
        assert not torch.equal(theirs.sequences, without), "this setting shows nothing here"
    for way in ("plain", "lm", "cascade"):
        out = decode(model, draft, way, **inputs, return_dict_in_generate=True, output_scores=True)
        tiny.assert_similar(out.sequences, theirs, out.scores)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
@pytest.mark.parametrize("knob", ["eos", "repetition_penalty", "bad_words_ids"])
def test_settings_on_other_families(tiny, family, knob):
    model, draft = tiny.pair(family)
    path = tiny.reference(model, **tiny.prompts(2), max_new_tokens=NEW).sequences[0, 9:].tolist()
    inputs = tiny.prompts(4) | {"max_new_tokens": NEW} | KNOBS[knob](path)
    tiny.assert_similar(decode(model, draft, "lm", **inputs), tiny.reference(model, **inputs))


def test_forced_bos_after_a_prompt_of_one_token(tiny):
    model, draft = tiny.pair("llama")
    inputs = {"input_ids": torch.tensor([[5], [9]]), "forced_bos_token_id": 11, "max_new_tokens": 6}
    theirs = tiny.reference(model, **inputs)
    assert theirs.sequences[:, 1].tolist() == [11, 11]
    for way in ("plain", "lm"):
        tiny.assert_similar(decode(model, draft, way, **inputs), theirs)


def test_without_a_prompt_generation_starts_from_bos(tiny):
    model, draft = tiny.pair("llama")
    tiny.assert_similar(decode(model, draft, "lm", max_new_tokens=6), tiny.reference(model, max_new_tokens=6))


def test_invalid_values_are_removed(tiny):
    class Break(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, input_ids.shape[1] % 7] = torch.nan
            scores[:, 30] = -torch.inf
            return scores

    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(1) | {"max_new_tokens": NEW, "remove_invalid_values": True, "logits_processor": [Break()]}
    tiny.assert_similar(decode(model, draft, "lm", **inputs), tiny.reference(model, **inputs))


SAMPLING = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.05},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "renormalize": {"top_k": 9, "temperature": 1.3, "renormalize_logits": True},
    "all at once": {
        "temperature": 1.2,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.4,
        "suppress_tokens": [3, 4],
    },
    "length": {"min_new_tokens": 8, "exponential_decay_length_penalty": (9, 1.5)},
}


@pytest.mark.parametrize("way", ["plain", "lm", "cascade", "ngram"])
@pytest.mark.parametrize("setting", SAMPLING)
def test_sampled_tokens_come_from_the_scores_of_transformers(tiny, setting, way):
    model, draft = tiny.pair("llama")
    prompt = tiny.prompts(1)["input_ids"]
    config = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, **SAMPLING[setting]}
    out = decode(
        model, draft, way, input_ids=prompt, seed=5, **config, return_dict_in_generate=True, output_scores=True
    )
    expected = scores_of(model, out.sequences, prompt.shape[1], config)
    for step, (ours, theirs) in enumerate(zip(out.scores, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert ours[0, out.sequences[0, 9 + step]] > -torch.inf


def scores_of(model, sequences, start, config):
    """What transformers' processors make of each step that led to ``sequences`` [1, L]: [1, V] a step."""
    prepared, _ = model._prepare_generation_config(None, **config)
    model._prepare_special_tokens(prepared, device=sequences.device)
    prepared = model._prepare_generated_length(prepared, True, True, "input_ids", start, sequences[:, :start])
    processors = model._get_logits_processor(prepared, input_ids_seq_length=start, device=sequences.device)
    with torch.no_grad():
        logits = model(sequences).logits
    ends = range(start, sequences.shape[1])
    return [processors(sequences[:, :end], logits[:, end - 1].clone()) for end in ends]


class Alternate(LogitsProcessor):
    """Stateless: even tokens after even lengths, odd tokens after odd ones."""

    def __call__(self, input_ids, scores):
        odd = torch.arange(scores.shape[1]) % 2 == 1
        return scores.masked_fill(odd if input_ids.shape[1] % 2 == 0 else ~odd, -torch.inf)


class Drift(LogitsProcessor):
    """Stateful: what it adds grows with every call, and every call must be one token further than the last."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        assert self.lengths == list(range(self.lengths[0], self.lengths[0] + len(self.lengths)))
        return scores + 0.05 * len(self.lengths) * torch.arange(scores.shape[1]).cos()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [Alternate, Drift])
def test_custom_logits_processors(tiny, make, way):
    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(1) | {"max_new_tokens": NEW}
    theirs = tiny.reference(model, **inputs, logits_processor=LogitsProcessorList([make()]))
    assert not torch.equal(theirs.sequences, tiny.reference(model, **inputs).sequences)
    ours = decode(model, draft, way, **inputs, logits_processor=LogitsProcessorList([make()]))
    tiny.assert_similar(ours, theirs)


class StopAfter(StoppingCriteria):
    """Stops at the n-th call, and counts on every call being one token further."""

    def __init__(self, calls, verdict):
        self.left, self.verdict, self.lengths = calls, verdict, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        self.left -= 1
        return self.verdict(input_ids, self.left <= 0)


@pytest.mark.parametrize("verdict", [lambda ids, done: torch.full((len(ids),), done), lambda ids, done: done])
@pytest.mark.parametrize("way", ["plain", "lm", "cascade"])
def test_custom_stopping_criteria_see_every_token_once(tiny, way, verdict):
    model, draft = tiny.pair("llama", "right")
    criterion = StopAfter(7, verdict)
    out = decode(
        model, draft, way, **tiny.prompts(1), max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([criterion])
    )
    theirs = tiny.reference(model, **tiny.prompts(1), max_new_tokens=7)
    tiny.assert_similar(out, theirs)
    assert criterion.lengths == list(range(10, 17))


def test_a_length_criterion_below_the_prompt_still_gets_one_token(tiny):
    from transformers.generation.stopping_criteria import MaxLengthCriteria

    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(1) | {"max_new_tokens": NEW, "stopping_criteria": [MaxLengthCriteria(4)]}
    tiny.assert_similar(decode(model, draft, "lm", **inputs), tiny.reference(model, **inputs))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    """Every token is one character, from "0" on."""
    vocabulary = {chr(ord("0") + i): i for i in range(tiny.VOCAB)}
    characters = Tokenizer(models.BPE(vocabulary, []))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_stop_strings(tiny, tokenizer, greedy, where, batch):
    model = tiny.build("llama")
    _, draft = tiny.pair("llama")
    stop = tokenizer.decode(greedy[4:6])
    stops = {"stop_strings": [stop], "max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0}
    inputs = tiny.prompts(batch) | {"tokenizer": tokenizer}
    if where == "argument":
        inputs |= stops
    elif where == "generation_config":
        inputs["generation_config"] = GenerationConfig(**stops)
    else:
        model.generation_config.update(**stops)
    theirs = tiny.reference(model, **inputs)
    for way in ("plain", "lm"):
        tiny.assert_similar(decode(model, draft, way, **inputs), theirs)
    if batch == 1:
        assert theirs.sequences.shape[1] == 9 + 6
    if where == "model":
        assert model.generation_config.stop_strings == stops["stop_strings"]


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 4])
def test_streamers_are_told_what_transformers_tells_them(tiny, batch):
    model, draft = tiny.pair("llama")
    theirs, inputs = Recorder(), tiny.prompts(batch) | {"max_new_tokens": 2 * NEW}
    tiny.reference(model, **inputs, streamer=theirs)
    for way in ("plain", "lm", "cascade"):
        ours = Recorder()
        decode(model, draft, way, **inputs, streamer=ours)
        assert ours.pieces == theirs.pieces
        assert ours.ended == theirs.ended == 1


@pytest.mark.parametrize("way", ["plain", "lm", "cascade"])
def test_output_objects_hold_scores_and_logits(tiny, way):
    model, draft = tiny.pair("llama")
    inputs = tiny.prompts(4) | {"max_new_tokens": 2 * NEW, "repetition_penalty": 1.3}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs = tiny.reference(model, **inputs, output_logits=True)
    ours = decode(model, draft, way, **inputs, **wanted)
    assert type(ours) is type(theirs)
    tiny.assert_similar(ours.sequences, theirs, ours.scores)
    assert len(ours.scores) == len(ours.logits) == ours.sequences.shape[1] - 9
    for row in range(4):
        new = ours.sequences[row, 9:].tolist()
        for step in range(new.index(2) + 1 if 2 in new else len(new)):
            for name in ("scores", "logits"):
                a, b = getattr(ours, name)[step], getattr(theirs, name)[step]
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a[row], b[row], atol=1e-4, rtol=1e-4)
    nothing = decode(model, draft, way, **inputs, return_dict_in_generate=True)
    assert nothing.scores is None and nothing.logits is None


def test_the_models_own_defaults_apply(tiny):
    model, (_, draft) = tiny.build("llama"), tiny.pair("llama")
    model.generation_config.update(max_new_tokens=8, repetition_penalty=1.6)
    before = model.generation_config.to_dict()
    theirs = tiny.reference(model, **tiny.prompts(2))
    for way in ("plain", "lm"):
        tiny.assert_similar(decode(model, draft, way, **tiny.prompts(2)), theirs)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("where", ["argument", "model"])
def test_transformers_own_assistant_arguments(tiny, where):
    model, (_, draft) = accel.attach(tiny.build("llama")), tiny.pair("llama")
    inputs = tiny.prompts(1) | {"max_new_tokens": 2 * NEW}
    theirs = tiny.reference(model, **inputs, assistant_model=draft)
    tiny.assert_similar(model.generate(**inputs, assistant_model=draft, num_assistant_tokens=4), theirs)
    assert len(accel.stats(model).drafted_by_position) == 4
    lookup = {"prompt_lookup_num_tokens": 3}
    if where == "model":
        model.generation_config.update(**lookup)
        lookup = {}
    tiny.assert_similar(model.generate(**inputs, **lookup), theirs)
    assert accel.stats(model).method == "speculative"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["plain", "lm"])
def test_every_dtype(tiny, dtype, way):
    model = tiny.build("llama").to(dtype)
    draft = tiny.draft_of(model, "partly")
    inputs = tiny.prompts(4) | {"max_new_tokens": NEW}
    theirs = tiny.reference(model, **inputs)
    out = decode(model, draft, way, **inputs, return_dict_in_generate=True, output_scores=True)
    assert out.scores[0].dtype == torch.float32
    # logits of some 10 in size, kept with 8 (bf16) or 11 (fp16) bits, behind a few dozen roundings
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    tiny.assert_similar(out.sequences, theirs, out.scores, tolerance=tolerance)


def test_rotary_positions_go_on_past_the_context(tiny) -> None:
    """transformers lets a rotary model write past its trained context; so do we, with the same positions."""
    model = tiny.build("llama", max_position_embeddings=24)
    ids = torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(accel.generate(model, ids, draft_length=4, **settings), expected)
