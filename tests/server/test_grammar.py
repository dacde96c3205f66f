"""Answers that match a grammar, whatever drafts try in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

import accel
from accel.errors import OptionError
from accel.sampling import LogitsPipeline
from accel.server import grammar as module
from accel.server.grammar import Grammar, GrammarProcessor, Grammars

TOKENIZER = byte_tokenizer()
END = 0
# more than the tokenizer knows, as many models have it
VOCAB = len(TOKENIZER) + 7
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = [9, 8, 7]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB, frozenset({END}))


def ids_of(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text)["input_ids"]
    return found


def allowed_after(processor: GrammarProcessor, tokens: Sequence[int]) -> set[int]:
    """Tokens whose score stays."""
    scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    out = processor(torch.tensor([[*PROMPT, *tokens]]), scores)
    kept = out[0] > -torch.inf
    assert torch.equal(out[0][kept], scores[0][kept])
    return set(kept.nonzero()[:, 0].tolist())


def texts(tokens: set[int]) -> set[str]:
    return {TOKENIZER.decode([token]) for token in tokens - {END}}


# -- what is allowed


def test_only_what_continues_the_text_is_allowed(grammars: Grammars) -> None:
    processor = grammars.regex("ab|ac|d").processor(len(PROMPT))
    assert texts(allowed_after(processor, [])) == {"a", "d"}
    assert texts(allowed_after(processor, ids_of("a"))) == {"b", "c"}
    assert allowed_after(processor, ids_of("ab")) == {END}


def test_a_complete_text_that_could_go_on_may_end_too(grammars: Grammars) -> None:
    processor = grammars.regex("a+").processor(len(PROMPT))
    assert allowed_after(processor, ids_of("aa")) == {END, *ids_of("a")}


def test_every_stop_token_ends_and_none_is_text() -> None:
    stops = frozenset({END, 5, 6})
    processor = Grammars(TOKENIZER, VOCAB, stops).regex("(.|\n)").processor(len(PROMPT))
    assert not stops & allowed_after(processor, [])
    assert allowed_after(processor, ids_of("x")) == stops


def test_behind_an_end_there_are_only_ends(grammars: Grammars) -> None:
    processor = grammars.regex("a").processor(len(PROMPT))
    assert allowed_after(processor, [*ids_of("a"), END]) == {END}
    assert allowed_after(processor, [*ids_of("a"), END, END, 17]) == {END}
    assert len(allowed_after(processor, [END])) == VOCAB
    assert texts(allowed_after(processor, [])) == {"a"}


def test_ids_that_no_token_has_are_never_allowed(grammars: Grammars) -> None:
    processor = grammars.regex("(.|\n)*").processor(len(PROMPT))
    assert max(allowed_after(processor, [])) < len(TOKENIZER)


def test_a_model_may_have_fewer_ids_than_the_tokenizer() -> None:
    processor = Grammars(TOKENIZER, 200, frozenset({END})).regex("(.|\n)*").processor(0)
    assert processor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 200)).shape == (1, 200)


def test_the_prompt_is_no_part_of_the_text(grammars: Grammars) -> None:
    one, other = grammars.regex("abc").processor(0), grammars.regex("abc").processor(2)
    ids, scores = torch.tensor([ids_of("ab")]), torch.zeros(1, VOCAB)
    assert texts(set((one(ids, scores)[0] == 0).nonzero()[:, 0].tolist())) == {"c"}
    assert texts(set((other(ids, scores)[0] == 0).nonzero()[:, 0].tolist())) == {"a"}


# -- a pure function of the ids


def test_scores_behind_forbidden_tokens_stay_as_they_are(grammars: Grammars) -> None:
    processor = grammars.regex("abc").processor(len(PROMPT))
    assert len(allowed_after(processor, ids_of("ax"))) == VOCAB
    assert len(allowed_after(processor, [*ids_of("ax"), END])) == VOCAB
    assert len(allowed_after(processor, [END])) == VOCAB
    assert texts(allowed_after(processor, ids_of("ab"))) == {"c"}


SHOWN = st.lists(st.text(alphabet='{}":, agekindcatdogs[]19', max_size=12).map(ids_of), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    SHOWN,
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=8),
    st.sampled_from(['{"kind":"cat","age":12,"tags":["a","b"]}', '{ "kind" : "dog", "age":1,"tags":[] }']),
)
def test_the_answer_depends_on_the_ids_alone(wrong: list[list[int]], walk: list[tuple[int, bool]], text: str) -> None:
    compiled = _shared()
    used = compiled.processor(len(PROMPT))
    right = [*ids_of(text), END]
    shown = [right[:length] + (wrong[length % len(wrong)] if bad else []) for length, bad in walk]
    for tokens in [*shown, right]:
        fresh = compiled.processor(len(PROMPT))
        assert allowed_after(used, tokens) == allowed_after(fresh, tokens)
    assert allowed_after(used, right) == {END}


_kept: list[Grammar] = []


def _shared() -> Grammar:
    """Compiled once for all examples."""
    if not _kept:
        _kept.append(Grammars(TOKENIZER, VOCAB, frozenset({END})).json_schema(SCHEMA))
    return _kept[0]


def test_rows_of_one_call_do_not_mix(grammars: Grammars) -> None:
    processor = grammars.regex("ab|cd").processor(0)
    out = processor(torch.tensor([ids_of("a"), ids_of("c"), ids_of("x")]), torch.zeros(3, VOCAB))
    kept = [set((row == 0).nonzero()[:, 0].tolist()) for row in out]
    assert [texts(kept[0]), texts(kept[1]), len(kept[2])] == [{"b"}, {"d"}, VOCAB]


def test_processors_of_one_grammar_are_apart(grammars: Grammars) -> None:
    found = grammars.regex("abc")
    one, other = found.processor(len(PROMPT)), found.processor(len(PROMPT))
    allowed_after(one, ids_of("ab"))
    assert texts(allowed_after(other, [])) == {"a"}


def test_rows_need_not_stay_in_step(grammars: Grammars) -> None:
    pipeline = LogitsPipeline([grammars.json_object().processor(0)])
    assert pipeline.rowwise and not pipeline.ignores_ids


# -- a whole model, with and without drafts


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_llama(max_position_embeddings=512)


def generated(model: Any, found: Grammar, prompt: Sequence[int], **kwargs: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    processors = LogitsProcessorList([found.processor(len(prompt))])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **kwargs)
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


@pytest.mark.parametrize("drafter", ["ngram", "suffix"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_drafts_change_nothing_and_the_answer_is_valid(
    model: Any, grammars: Grammars, drafter: str, sampled: bool
) -> None:
    found = grammars.json_schema(SCHEMA | {"x-guidance": {"whitespace_flexible": False}})
    drafted = 0
    for seed in range(3):
        # the prompt shows what n-grams can repeat, right and wrong
        prompt = ids_of('{"kind":"cow","age":7,"tags":["a","c"]} {"kind":"dog","age":123}' + "xyz"[seed])
        kwargs = {"max_new_tokens": 120, "do_sample": sampled}
        with_drafts = accel.attach(model, drafter=drafter, draft_length=4, seed=seed)
        ours = generated(with_drafts, found, prompt, **kwargs)
        drafted += accel.stats(model).drafted_tokens
        accel.detach(model)
        plain = accel.attach(model, method="plain", seed=seed)
        assert ours == generated(plain, found, prompt, **kwargs)
        accel.detach(model)
        if not sampled:
            assert ours == generated(model, found, prompt, **kwargs)
        assert ours[-1] == END
        jsonschema.validate(json.loads(TOKENIZER.decode(ours[:-1])), SCHEMA)
    assert drafted > 0


SCHEMAS = [
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}]},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"]}
    | {"additionalProperties": False},
    {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"const": 1}}, "required": ["v"]}}
        | {"pair": {"type": "array", "prefixItems": [{"$ref": "#/$defs/leaf"}] * 2, "items": False, "minItems": 2}},
        "$ref": "#/$defs/pair",
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: next(iter(schema)))
def test_random_text_matches_the_schema(grammars: Grammars, schema: dict[str, Any]) -> None:
    found = grammars.json_schema(schema)
    generator = torch.Generator().manual_seed(3)
    complete = 0
    for _ in range(6):
        processor, tokens = found.processor(0), list[int]()
        while len(tokens) < 200 and END not in tokens:
            # ends are likely where they are allowed, so that endless repetitions stay short
            scores = torch.randn(1, VOCAB, generator=generator)
            scores[0, [END, *ids_of('}]"')]] += 4
            scores = processor(torch.tensor([tokens], dtype=torch.long), scores)
            tokens.append(int(scores.argmax()))
        if tokens[-1] == END:
            complete += 1
            jsonschema.validate(json.loads(TOKENIZER.decode(tokens[:-1])), schema)
    assert complete >= 5


def test_any_json_object(grammars: Grammars) -> None:
    processor = grammars.json_object().processor(len(PROMPT))
    assert texts(allowed_after(processor, [])) == {"{"}
    assert allowed_after(processor, ids_of('{"a": [1, {"b": null}]}')) == {END}
    assert len(allowed_after(processor, ids_of("[1]"))) == VOCAB


def test_whitespace_has_an_end(grammars: Grammars) -> None:
    processor = grammars.json_object().processor(len(PROMPT))
    blank, line = ids_of(" ")[0], ids_of("\n")[0]
    assert {blank, line} <= allowed_after(processor, ids_of("{"))
    assert not {blank, line} & allowed_after(processor, ids_of("{ "))
    assert blank in allowed_after(processor, ids_of("{\n" + " " * 23))
    assert not {blank, line} & allowed_after(processor, ids_of("{\n" + " " * 24))


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_json_as_python_writes_it_is_allowed(grammars: Grammars, indent: int | None) -> None:
    text = json.dumps({"kind": "cat", "age": 3, "tags": ["a", "b"]}, indent=indent)
    assert allowed_after(grammars.json_schema(SCHEMA).processor(len(PROMPT)), ids_of(text)) == {END}


def test_a_schema_may_say_what_whitespace_there_is(grammars: Grammars) -> None:
    tight = grammars.json_schema(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}).processor(len(PROMPT))
    assert texts(allowed_after(tight, ids_of("{"))) == {'"'}


# -- what cannot be compiled


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("json_schema", {"type": "foo"}, "JSON schema cannot be used: Invalid type: foo"),
        ("json_schema", {"not": {}}, "not"),
        ("json_schema", {"$ref": "#/nope"}, "nope"),
        ("json_schema", {"const": object()}, "is no JSON"),
        ("json_schema", {"title": "x" * 70000}, "at most 65,536 are allowed"),
        ("regex", "(", "regular expression cannot be used"),
        ("regex", "(?=a)b", "regular expression cannot be used"),
        ("regex", "(" * 70 + "a" + ")" * 70, "nested 70 deep: at most 64"),
        ("lark", "start: nothing", "grammar cannot be used"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(grammars: Grammars, kind: str, text: Any, why: str) -> None:
    with pytest.raises(OptionError) as caught:
        getattr(grammars, kind)(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4500)) + 'r4500: "a"',
        'start: %json {"$defs":{'
        + ",".join(f'"a{i}":{{"items":{{"items":{{"$ref":"#/$defs/a{i + 1}"}}}}}}' for i in range(1200))
        + ',"a1200":{"type":"string"}},"$ref":"#/$defs/a0"}',
    ],
    ids=["rules", "references"],
)
def test_long_chains_of_names_end_no_process(grammars: Grammars, text: str) -> None:
    assert grammars.lark(text).processor(0).allowed([]) is not None


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(OptionError, match="fast tokenizer"):
        Grammars(None, VOCAB, frozenset({END})).json_object()


def test_a_model_without_an_end_is_refused() -> None:
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(OptionError, match="token that ends it"):
        Grammars(endless, VOCAB, frozenset()).json_object()


def test_an_answer_that_cannot_go_on_ends(grammars: Grammars, caplog: pytest.LogCaptureFixture) -> None:
    words = module.Grammars(_letters("ab"), 3, frozenset({END})).regex("[ac]c")
    # "c" has no token
    assert words.processor(0).allowed([1]).nonzero()[0].tolist() == [END]  # type: ignore[union-attr]
    assert "ends an answer before it is complete" in caplog.text


def _letters(alphabet: str) -> Any:
    vocab = {letter: place for place, letter in enumerate(["</s>", *alphabet])}
    letters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")


# -- what is kept


def test_grammars_are_compiled_once_and_the_oldest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    fresh = Grammars(TOKENIZER, VOCAB, frozenset({END}))
    a, b = fresh.regex("a"), fresh.regex("b")
    assert fresh.regex("a") is a
    fresh.regex("c")
    assert fresh.regex("a") is a
    assert fresh.regex("b") is not b


def test_a_regex_and_a_grammar_of_one_text_differ(grammars: Grammars) -> None:
    text = 'start: "a"'
    assert texts(allowed_after(grammars.lark(text).processor(len(PROMPT)), [])) == {"a"}
    assert texts(allowed_after(grammars.regex(text).processor(len(PROMPT)), [])) == {"s"}
