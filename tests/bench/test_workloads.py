"""Prompts: the embedded sample, reading files with clear errors, limits, and chat templates."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from accel.bench import workloads
from accel.bench.workloads import Prompt, WorkloadError, digest, encode, group, load_jsonl, load_suite, sample
from accel.errors import OptionError


def test_embedded_sample_has_three_prompts_of_each_of_spec_benchs_six_groups():
    prompts = load_jsonl(workloads.EMBEDDED)
    groups = Counter(prompt.group for prompt in prompts)
    assert groups == dict.fromkeys(("multi-turn", "translation", "summarization", "qa", "math_reasoning", "rag"), 3)
    assert len({prompt.id for prompt in prompts}) == 18
    assert all(len(prompt.turns) == (2 if prompt.group == "multi-turn" else 1) for prompt in prompts)


def test_default_suite_takes_one_of_each_group_and_a_limit_more():
    assert len(load_suite("default")) == 6
    assert len(load_suite("default", limit=2)) == 12
    assert len(load_suite("default", limit=99)) == 18


def test_answers_are_there_or_the_file_is_refused(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": "2"}\n')
    assert [prompt.answer for prompt in workloads.load_answered(file)] == ["1", "2"]
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": ""}\n')
    with pytest.raises(OptionError, match=r"asked\.jsonl: every question needs an answer to be held against"):
        workloads.load_answered(file)


def test_groups():
    assert group("coding") == group("stem") == "multi-turn"
    assert group("rag") == "rag"
    assert group("my own") == "my own"


def test_sample_spreads_a_group_over_its_categories_and_keeps_the_order():
    categories = ["writing", "writing", "coding", "coding", "qa", "qa", "stem"]
    prompts = [Prompt(str(i), category, ("x",)) for i, category in enumerate(categories)]
    assert [prompt.id for prompt in sample(prompts, 2)] == ["0", "2", "4", "5"]
    assert [prompt.id for prompt in sample(prompts, 4)] == ["0", "1", "2", "4", "5", "6"]
    with pytest.raises(OptionError, match="limit=0"):
        sample(prompts, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: not JSON"),
        ("[1]", r":2: expected a JSON object, got list"),
        ('{"question_id": 1}', r":2: missing category, turns; expected JSON lines with .* or with question"),
        ('{"prompt": "x"}', r":2: missing question_id, category, turns; expected"),
        ('{"question": " "}', r":2: question must be a non-empty string"),
        ('{"question": ["x"]}', r":2: question must be a non-empty string"),
        ('{"question": "x", "answer": 3}', r":2: answer must be a string"),
        ('{"question_id": 1, "category": "qa", "turns": "x"}', r":2: turns must be a list"),
        ('{"question_id": 1, "category": "qa", "turns": []}', r":2: turns must be a list"),
        ('{"question_id": 1, "category": "qa", "turns": [" "]}', r":2: turns must be a list"),
        ('{"question_id": [1], "category": "qa", "turns": ["x"]}', r":2: question_id must be"),
        ('{"question_id": 7, "category": "qa", "turns": ["x"]}', r"question_id 7 appears twice"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question_id": 7, "category": "qa", "turns": ["x"]}\n' + line + "\n")
    with pytest.raises(WorkloadError, match=message):
        load_jsonl(file)


def test_questions_are_prompts_with_their_answers(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "Why?"}, {"question": "Who?"}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    prompts = load_jsonl(file)
    # ids are the lines' numbers, also where lines are empty
    assert [(p.id, p.category, p.answer) for p in prompts] == [
        ("1", "gsm8k", "1 + 1 = 2\n#### 2"),
        ("3", "question", None),
        ("5", "question", None),
    ]
    assert prompts[0].turns == ("How many?",)
    assert len(load_suite("spec-bench", file)) == len(load_suite("drafts", file)) == 3
    # of each group
    assert len(load_suite("lenience", file, limit=1)) == 2


def test_a_suite_that_may_read_a_file_asks_the_embedded_prompts_without_one():
    assert load_suite("drafts") == load_suite("default")
    with pytest.raises(OptionError, match="suite 'lenience' reads a file"):
        load_suite("lenience")


def test_unreadable_and_empty_files(tmp_path):
    with pytest.raises(WorkloadError, match="cannot read prompts"):
        load_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="holds no prompts"):
        load_jsonl(tmp_path / "empty.jsonl")


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    row = {"question_id": 1, "category": "qa", "turns": ["one\u2028two"]}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_jsonl(file)[0].turns == ("one\u2028two",)


def test_suites_say_what_they_need(tmp_path):
    with pytest.raises(OptionError, match=r"unknown suite 'x': choose from default, drafts, lenience, spec-bench"):
        load_suite("x")
    with pytest.raises(OptionError, match="--prompts FILE"):
        load_suite("spec-bench")
    with pytest.raises(OptionError, match="--suite spec-bench"):
        load_suite("default", tmp_path / "mine.jsonl")


def test_digest_depends_on_content_and_order():
    one, two = Prompt("1", "qa", ("a",)), Prompt("2", "qa", ("a",))
    assert digest([one, two]) == digest([one, two]) != digest([two, one])
    assert digest([one]) != digest([Prompt("1", "qa", ("b",))])
    assert (
        digest([one]) != digest([Prompt("1", "qa", ("a",), "#### 3")]) != digest([Prompt("1", "qa", ("a",), "#### 4")])
    )


def test_encode_without_a_template_joins_the_turns(tokenizer):
    ids = encode(tokenizer, ["ab", "cd"], ["x"])
    assert ids.shape == (1, 9)
    assert tokenizer.decode(ids[0]) == "ab\n\nx\n\ncd"


def test_encode_uses_the_chat_template(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert tokenizer.decode(encode(tokenizer, ["a"])[0]) == "<user>a>"
    assert tokenizer.decode(encode(tokenizer, ["a", "b"], ["r"])[0]) == "<user>a<assistant>r<user>b>"
