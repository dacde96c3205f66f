"""What requests say about sampling, against the definitions of the fields."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from torch import Tensor
from transformers.generation import logits_process as hf

from accel.errors import OptionError
from accel.sampling import LogitsPipeline
from accel.server.grammar import Grammars
from accel.server.sampling import SamplingFields, Truncation, defaults, sampling_for

VOCAB = 50
PROMPT = [3, 4, 4]


def logits(rows: int = 1, *, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def scored(fields: SamplingFields, ids: list[int], given: Tensor) -> Tensor:
    """Scores of the token behind ``ids``, which begin with the prompt."""
    _, make = sampling_for(fields, prompt=PROMPT)
    return make()(torch.tensor([ids]), given, [0])


def test_the_defaults_change_nothing() -> None:
    do_sample, make = sampling_for(SamplingFields(), prompt=PROMPT)
    assert do_sample and not make()


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6])
def test_without_temperature_the_best_token_is_taken(temperature: float) -> None:
    fields = SamplingFields(temperature=temperature, top_p=0.5, top_k=3, min_p=0.2)
    do_sample, make = sampling_for(fields, prompt=PROMPT)
    # what cuts off unlikely tokens has nothing to do
    assert not do_sample and not make()


def test_temperature_divides() -> None:
    given = logits()
    torch.testing.assert_close(scored(SamplingFields(temperature=0.5), PROMPT, given), given / 0.5)


def test_penalties_of_openai_count_the_answer_alone() -> None:
    given = logits()
    out = scored(SamplingFields(frequency_penalty=0.5, presence_penalty=0.25), [*PROMPT, 7, 9, 7], given)
    expected = given.clone()
    expected[0, 7] -= 2 * 0.5 + 0.25
    expected[0, 9] -= 0.5 + 0.25
    torch.testing.assert_close(out, expected)


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    given = logits()
    out = scored(SamplingFields(repetition_penalty=2.0), [*PROMPT, 7], given)
    expected = given.clone()
    for token in (3, 4, 7):
        expected[0, token] = given[0, token] / 2 if given[0, token] > 0 else given[0, token] * 2
    torch.testing.assert_close(out, expected)


def test_before_the_first_token_nothing_is_penalised() -> None:
    given = logits()
    assert torch.equal(scored(SamplingFields(frequency_penalty=2.0, presence_penalty=2.0), PROMPT, given), given)


def test_biases_are_added() -> None:
    given = logits()
    out = scored(SamplingFields(logit_bias={5: 100, 6: -1.5}), PROMPT, given)
    expected = given.clone()
    expected[0, 5] += 100
    expected[0, 6] -= 1.5
    torch.testing.assert_close(out, expected)


def test_stop_tokens_wait_for_the_least_length() -> None:
    fields = SamplingFields(min_tokens=2, stop_tokens=frozenset({1, 8}))
    given = logits()
    for new, waits in (([], True), ([5], True), ([5, 6], False)):
        out = scored(fields, [*PROMPT, *new], given)
        forbidden = set((out[0] == -torch.inf).nonzero()[:, 0].tolist())
        assert forbidden == ({1, 8} if waits else set())


def test_penalties_come_before_temperature_and_after_biases() -> None:
    given = logits()
    fields = SamplingFields(temperature=0.5, frequency_penalty=1.0, logit_bias={7: 3})
    out = scored(fields, [*PROMPT, 7], given)
    assert float(out[0, 7]) == pytest.approx((float(given[0, 7]) + 3 - 1) / 0.5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 4000}, [hf.TopKLogitsWarper(4000)]),
        ({"top_p": 0.9}, [hf.TopPLogitsWarper(0.9)]),
        ({"top_p": 0.999999}, [hf.TopPLogitsWarper(0.999999)]),
        ({"top_p": 0.001}, [hf.TopPLogitsWarper(0.001)]),
        ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
        ({"min_p": 1e-6}, [hf.MinPLogitsWarper(1e-6)]),
        ({"top_k": 20, "top_p": 0.7}, [hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.02, "top_p": 0.8}, [hf.MinPLogitsWarper(0.02), hf.TopPLogitsWarper(0.8)]),
        (
            {"min_p": 1e-5, "top_k": 30, "top_p": 0.95},
            [hf.MinPLogitsWarper(1e-5), hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.95)],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("peak", [0.01, 1.0, 20.0])
def test_unlikely_tokens_are_cut_off_as_transformers_does(ours: dict[str, Any], theirs: Any, peak: float) -> None:
    # flat, usual and peaked: with candidates that suffice, and with those that do not
    given = peak * logits(3, vocab=5000)
    given[1, 100:4000] = -torch.inf
    out = expected = given
    out = LogitsPipeline([Truncation(**ours)]).warp(given)
    for warper in theirs:
        expected = warper(torch.empty(3, 0), expected)
    kept, should = out > -torch.inf, expected > -torch.inf
    assert torch.equal(out[kept], given[kept])
    # sums of other orders: a token whose place is decided in the last bit may be on either side
    assert (kept != should).sum() <= 3 * (ours.get("top_p") == 0.999999)
    assert kept.any(-1).all()


def test_tokens_as_likely_as_the_last_one_stay() -> None:
    given = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert (Truncation(top_k=1)(torch.empty(1, 0), given) > -torch.inf).tolist() == [[False, True, True, False]]


def test_positions_are_cut_off_together() -> None:
    _, make = sampling_for(SamplingFields(top_p=0.9, temperature=0.7), prompt=PROMPT)
    pipeline = make()
    assert pipeline.ignores_ids and pipeline.rowwise
    given = logits(4)
    alone = torch.cat([pipeline.warp(row[None]) for row in given])
    assert torch.equal(pipeline.warp(given), alone)


def test_drafters_do_not_see_biases() -> None:
    _, make = sampling_for(SamplingFields(logit_bias={5: 100}), prompt=PROMPT)
    given = logits()
    assert torch.equal(make().warp(given), given)
    assert make().rowwise


EVERYTHING = SamplingFields(
    temperature=0.7,
    top_p=0.9,
    top_k=30,
    min_p=0.01,
    frequency_penalty=0.1,
    presence_penalty=0.2,
    repetition_penalty=1.1,
    logit_bias={5: 1.0},
    min_tokens=2,
    stop_tokens=frozenset({1}),
    vocab_size=VOCAB,
)


def test_rows_need_not_stay_in_step() -> None:
    _, make = sampling_for(EVERYTHING, prompt=PROMPT)
    pipeline = make()
    assert pipeline.rowwise and not pipeline.ignores_ids
    ids = torch.tensor([[*PROMPT, 7, 7], [*PROMPT, 9, 5]])
    given = logits(2)
    alone = torch.cat([pipeline(ids[i : i + 1], given[i : i + 1], [i]) for i in range(2)])
    torch.testing.assert_close(pipeline(ids, given, [0, 1]), alone)


def test_a_pipeline_leaves_the_logits_alone() -> None:
    given = logits()
    before = given.clone()
    scored(EVERYTHING, [*PROMPT, 7], given)
    assert torch.equal(given, before)


# -- one object for what means the same


def pipeline_of(prompt: list[int] = PROMPT, **changes: Any) -> LogitsPipeline:
    _, make = sampling_for(dataclasses.replace(SamplingFields(), **changes), prompt=prompt)
    return make()


def test_equal_fields_share_a_pipeline() -> None:
    assert pipeline_of(temperature=0.7) is pipeline_of(temperature=0.7, prompt=[1] * 9)
    assert pipeline_of(temperature=0.7) is pipeline_of(temperature=0.7, stop_tokens=frozenset({1}))
    assert pipeline_of(temperature=0.7) is not pipeline_of(temperature=0.8)
    assert pipeline_of(logit_bias={1: 1.0, 2: 1.0}) is pipeline_of(logit_bias={2: 1.0, 1: 1.0})


def test_what_counts_the_answer_knows_where_it_begins() -> None:
    assert pipeline_of(presence_penalty=1.0) is pipeline_of(presence_penalty=1.0, prompt=[9, 9, 9])
    assert pipeline_of(presence_penalty=1.0) is not pipeline_of(presence_penalty=1.0, prompt=[9])
    waits = {"min_tokens": 2, "stop_tokens": frozenset({1})}
    assert pipeline_of(**waits) is not pipeline_of(**waits, prompt=[9])


def test_with_a_grammar_each_continuation_has_its_own() -> None:
    tokenizer = byte_tokenizer()
    grammar = Grammars(tokenizer, 257, frozenset({0})).regex("ab")
    fields = SamplingFields(temperature=0.5, min_tokens=9, stop_tokens=frozenset({0}))
    do_sample, make = sampling_for(fields, prompt=PROMPT, grammar=grammar)
    one, other = make(), make()
    assert do_sample and one is not other and one.rowwise
    assert one.processors[0] is not other.processors[0]
    assert one.processors[1:] == other.processors[1:]
    a, b = tokenizer("ab")["input_ids"]
    out = one(torch.tensor([[*PROMPT, a]]), torch.zeros(1, 257), [0])
    assert (out[0] > -torch.inf).nonzero()[:, 0].tolist() == [b]
    # the grammar is complete before there are enough tokens: it may end all the same
    out = one(torch.tensor([[*PROMPT, a, b]]), torch.zeros(1, 257), [0])
    assert (out[0] > -torch.inf).nonzero()[:, 0].tolist() == [0]


# -- defaults and refusals


class FakeModel:
    def __init__(self, **config: Any) -> None:
        self.generation_config = SimpleNamespace(**config)

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=VOCAB)


def test_the_models_own_settings_are_the_default() -> None:
    told = defaults(FakeModel(temperature=0.6, top_p=0.9, top_k=None, do_sample=False))
    assert told == SamplingFields(temperature=0.6, top_p=0.9, vocab_size=VOCAB)
    assert defaults(FakeModel()) == SamplingFields(vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("temperature", -0.1, "must be at least 0 and at most 100"),
        ("temperature", math.nan, "must be at least 0"),
        ("temperature", "1", "must be at least 0"),
        ("temperature", True, "must be at least 0"),
        ("top_p", 0, "must be more than 0 and at most 1"),
        ("top_p", 1.1, "must be more than 0 and at most 1"),
        ("top_k", -1, "must be at least 0"),
        ("top_k", 1.5, "whole number"),
        ("min_p", 2, "must be at least 0 and at most 1"),
        ("frequency_penalty", 2.1, "must be at least -2 and at most 2"),
        ("presence_penalty", -2.1, "must be at least -2 and at most 2"),
        ("repetition_penalty", 0, "must be more than 0"),
        ("min_tokens", -1, "must be at least 0"),
        ("logit_bias", {VOCAB: 1}, f"token ids are whole numbers, 0 to {VOCAB - 1}"),
        ("logit_bias", {-1: 1}, "token ids are whole numbers"),
        ("logit_bias", {"5": 1}, "token ids are whole numbers"),
        ("logit_bias", {5: 101}, "of token 5=101: must be at least -100 and at most 100"),
        ("logit_bias", {5: math.inf}, "must be at least -100"),
        ("logit_bias", dict.fromkeys(range(2000), 1), "at most 1024 are allowed"),
        ("stop_tokens", frozenset({VOCAB}), "names the token 50"),
    ],
)
def test_what_is_out_of_bounds_is_refused(name: str, value: Any, why: str) -> None:
    with pytest.raises(OptionError, match=f"{name}.*{why}") as caught:
        SamplingFields(vocab_size=VOCAB, **{name: value})
    assert "\n" not in str(caught.value)
