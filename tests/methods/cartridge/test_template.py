"""What a cartridge replaces and what is left, one behind the other, is the prompt with the document in it."""

from __future__ import annotations

import pytest

from accel.errors import OptionError
from accel.methods.cartridge.template import document_ids, query_ids, text_ids

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>You are helpful.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
ASK = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def tokenizer(bytewise):
    bytewise.chat_template = CHATML
    return bytewise


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def test_a_system_cartridge_and_the_query_are_the_conversation_with_the_document(tokenizer):
    head = document_ids(tokenizer, "The quay.", "system", "Read: ")
    tail = query_ids(tokenizer, ASK, "system")
    whole = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Read: The quay."}, *ASK], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert head + tail == whole
    assert text_of(tokenizer, tail) == "<|user|>Where?<|end|><|assistant|>", "no system message of the template's own"


def test_a_callers_own_system_message_stands_behind_the_cartridge(tokenizer):
    tail = query_ids(tokenizer, [{"role": "system", "content": "Be brief."}, *ASK], "system")
    assert text_of(tokenizer, tail) == "<|system|>Be brief.<|end|><|user|>Where?<|end|><|assistant|>"


def test_a_text_cartridge_stands_in_front_of_anything(tokenizer):
    assert text_of(tokenizer, document_ids(tokenizer, "The quay.", "text")) == "The quay."
    assert text_of(tokenizer, query_ids(tokenizer, ASK, "text")).endswith("<|user|>Where?<|end|><|assistant|>")
    tokenizer.chat_template = None
    assert text_of(tokenizer, query_ids(tokenizer, ASK, "text")) == "\n\nWhere?\n"
    assert text_of(tokenizer, text_ids(tokenizer, "It is")) == "It is"


def test_templates_that_cannot_are_refused_in_one_line(tokenizer):
    with pytest.raises(OptionError, match="unknown template 'jinja'"):
        document_ids(tokenizer, "x", "jinja")
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(OptionError, match=r"takes no system message alone \(no system here\): use template text"):
        query_ids(tokenizer, ASK, "system")
    tokenizer.chat_template = None
    with pytest.raises(OptionError, match="no chat template: use template text"):
        document_ids(tokenizer, "x", "system")
