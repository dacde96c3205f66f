"""Prompts: every usual shape of a line, one error for all bad lines, chat templates, and a split that stays."""

from __future__ import annotations

import json

import pytest

from accel.artifacts import BaseModel
from accel.distill.prompts import Prompt, encode, parse, read, split
from accel.errors import OptionError
from accel.request_log import RequestLog, older


def asked(*turns):
    return tuple(zip(("user", "assistant") * len(turns), turns, strict=False))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, Prompt(asked("Hi"))),
        ({"prompt": "Hi", "completion": "Ho"}, Prompt(asked("Hi"), answer="Ho")),
        ({"question": "1+1?", "answer": "2"}, Prompt(asked("1+1?"), answer="2")),
        ({"id": 7, "instruction": "Add.", "input": ""}, Prompt(asked("Add."))),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, Prompt(asked("Add.\n1 1"), answer="2")),
        ({"turns": ["One?", "Two?"], "category": "qa"}, Prompt(asked("One?"))),
        ({"messages": [{"role": "user", "content": "Hi"}]}, Prompt(asked("Hi"))),
        (
            {"messages": [{"role": r, "content": c} for r, c in (*asked("Hi", "Ho", "So?"), ("assistant", "Yes"))]},
            Prompt(asked("Hi", "Ho", "So?"), answer="Yes"),
        ),
        ({"text": "Once upon"}, Prompt(text="Once upon")),
        ({"text": "Once upon", "response": None}, Prompt(text="Once upon")),
    ],
    ids=str,
)
def test_the_usual_shapes(row, expected):
    assert parse(json.dumps(row)) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"query": "a"}', "needs one of prompt, question, .* has 'query'"),
        ("{}", "has nothing"),
        ('{"prompt": ""}', "prompt must be a text that is not empty"),
        ('{"prompt": "a", "answer": 3}', "answer must be a text"),
        ('{"instruction": "a", "input": [1]}', "input must be a text"),
        ('{"turns": []}', "turns must be a list"),
        ('{"turns": ["  "]}', "turns must be a list"),
        ('{"messages": "a"}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "needs a role and a content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing that is asked"),
    ],
)
def test_bad_lines(line, says):
    with pytest.raises(ValueError, match=says):
        parse(line)


def test_bad_lines_are_named_in_one_error(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"prompt": "a\u2028b"}\n\nnonsense\n', encoding="utf-8")
    two.write_text("{}\n" * 6)
    with pytest.raises(OptionError) as caught:
        read([one, two])
    text = str(caught.value)
    assert f"{one}:3: not JSON" in text and f"{two}:1: needs one of" in text
    assert text.endswith("; and 2 more") and "\n" not in text
    two.write_text("\n")
    one.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read([one, two]) == [Prompt(asked("a\u2028b"))]
    with pytest.raises(OptionError, match="no prompts in"):
        read([two])
    with pytest.raises(OptionError, match=r"cannot read prompts from .*three"):
        read([tmp_path / "three.jsonl"])


BASE = BaseModel("toy", None, "a" * 64, None, 100)


def logged(path, *rows):
    log = RequestLog(path, BASE)
    for prompt, new in rows:
        log.append(prompt, new)
    return path


def test_a_request_log_is_read_as_it_was_written_oldest_first(tmp_path):
    file, text = tmp_path / "log.jsonl", tmp_path / "text.jsonl"
    logged(file, ([1, 2], [3, 0]), ([4], [5]))
    file.rename(older(file))
    logged(file, ([1, 2], [6]))
    text.write_text('{"prompt": "a bb", "answer": "ccc"}\n')
    expected = [([1, 2], [3, 0]), ([4], [5]), ([1, 2], [6])]

    def ids(*files):
        # no chat template, no end token: a row has what it had
        encoded = encode(read(files), Words(), longest=10, end=2)
        return list(zip(encoded.prompts, encoded.answers, strict=True))

    assert ids(file) == expected
    assert ids(older(file)) == expected[:2]
    assert ids(text, file) == [([16, 11, 12, 9], [13, 2]), *expected]
    # given by name as well, it counts once
    assert ids(file, older(file)) == [expected[2], *expected[:2]]
    encoded = encode(read([file]), Words(), longest=1)
    assert encoded.prompts == [[4]] and encoded.num_too_long == 2
    digests = [prompt.digest() for prompt in read([file])]
    assert digests[0] == digests[2] != digests[1], "a prompt stays on its side whatever was answered"


def test_damage_in_a_request_log_is_one_error_with_all_others(tmp_path):
    file, text = logged(tmp_path / "log.jsonl", ([1], [2])), tmp_path / "text.jsonl"
    text.write_text("{}\n")
    file.write_text(file.read_text() + "garbage\n")
    with pytest.raises(OptionError, match=r"text.jsonl:1: needs one of .*; .*log.jsonl:3: not JSON"):
        read([text, file])
    # without its header it is a file like any other
    file.write_text('{"prompt_tokens":[1],"new_tokens":[2]}\n')
    with pytest.raises(OptionError, match=r"log\.jsonl:1: needs one of prompt"):
        read([file])
    (empty := tmp_path / "empty.jsonl").write_text("")
    RequestLog(empty, BASE)
    with pytest.raises(OptionError, match="no prompts in"):
        read([empty])


class Words:
    """A tokenizer of words' lengths, with a chat template."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [10 + len(word) for word in text.split()]}

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and return_dict
        ids = [10 + len(word) for each in messages for word in ("<" + each["role"] + ">", *each["content"].split())]
        return {"input_ids": [*ids, 9]}


def test_encoding_uses_the_chat_template_and_counts_what_is_too_long():
    prompts = [
        Prompt(asked("a bb"), answer="ccc"),
        Prompt(text="a bb"),
        Prompt(asked("a " * 50)),
        Prompt(asked("dddd")),
    ]
    encoded = encode(prompts, Words(), longest=10, end=2)
    assert encoded.prompts == [[16, 11, 12, 9], [1, 11, 12], [16, 14, 9]]
    assert encoded.answers == [[13, 2], None, None]
    assert encoded.num_too_long == 1
    assert encoded.digests == [prompts[place].digest() for place in (0, 1, 3)]
    with pytest.raises(OptionError, match="all 4 prompts are longer than 1 tokens"):
        encode(prompts, Words(), longest=1)
    plain = Words()
    plain.chat_template = None
    assert encode(prompts[:1], plain, longest=10).prompts == [[1, 11, 12]]


def test_the_split_follows_the_prompt_and_nothing_else():
    prompts = [Prompt(asked(f"question {i}")) for i in range(2000)]
    digests = [each.digest() for each in prompts]
    kept, held = split(digests, 0.02, 1000)
    assert sorted(kept + held) == list(range(2000))
    assert 20 <= len(held) <= 65
    # others come and go, the order changes: everybody stays on their side
    fewer = digests[::-1][:1500]
    assert {fewer[i] for i in split(fewer, 0.02, 1000)[1]} == {digests[i] for i in held} & set(fewer)
    # an answer plays no part, and a copy is on the same side as its prompt, asked once
    assert Prompt(asked("question 0"), answer="a").digest() == digests[0]
    kept_twice, held_twice = split(digests * 2, 0.02, 1000)
    assert held_twice == held and len(kept_twice) == 2 * len(kept)


def test_the_split_holds_out_one_at_least_and_no_more_than_asked():
    digests = [Prompt(text=str(i)).digest() for i in range(300)]
    assert len(split(digests[:3], 1e-6, 5)[1]) == 1
    assert len(split(digests, 0.5, 5)[1]) == 5
    assert len(split(digests, 0.5, 5)[0]) == 295
    with pytest.raises(OptionError, match="one prompt cannot be both"):
        split(digests[:1] * 4, 0.5, 5)
