"""Self-study: what is asked, what stood in view, and that a killed run goes on to the same conversations."""

from __future__ import annotations

import random

import pytest
import torch

from accel.distill.teacher import Lesson
from accel.errors import OptionError
from accel.methods.cartridge.distill import self_study
from accel.methods.cartridge.distill.self_study import Chunks, Corpus, Study, cut, study
from accel.methods.cartridge.template import document_ids, query_ids

TEXT = "The ferry Marigold leaves at nine. The lamp was lit in 1903 by Ada Holm. " * 4
CORPUS = Corpus("handbook", TEXT, "text", "Read this. ")
HOW = Study(
    conversations=13, shortest_chunk=20, longest_chunk=40, per_chunk=4, question_tokens=6, answer_tokens=5, k=4, rows=5
)


@pytest.fixture
def model(tiny):
    return tiny.build("llama", vocab_size=257, max_position_embeddings=1024, eos_token_id=0, pad_token_id=0)


def run(model, tokenizer, folder, how=HOW, corpus=CORPUS):
    return sorted(study(model, tokenizer, corpus, how, folder, {"name": "tiny"}, [0]), key=lambda each: each.index)


def same(one, other):
    fields = ("prompt", "answer", "ids", "logp")
    return len(one) == len(other) and all(
        a.index == b.index and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)
        for a, b in zip(one, other, strict=True)
    )


def test_lessons_hold_the_teachers_view_with_the_chunk_before_it(model, bytewise, tmp_path):
    """Brute force: the model on chunk + question + answer, without any cache."""
    lessons = run(model, bytewise, tmp_path)
    chunks = Chunks(bytewise, CORPUS, HOW)
    assert 0 < len(lessons) <= 13
    asked, quoted = {}, 0
    for index in range(13):
        question = _question_of(model, bytewise, chunks, index)
        if question:
            asked[len(asked)] = (index, question)
    for lesson in lessons:
        index, question = asked[lesson.index]
        prompt = query_ids(bytewise, [{"role": "user", "content": question}], "text")
        assert lesson.prompt.tolist() == prompt
        head = document_ids(bytewise, chunks.text(index // 4), "text", "Read this. ")
        whole = torch.tensor([head + prompt + lesson.answer.tolist()])
        with torch.no_grad():
            logits = model(whole).logits[0, len(head) + len(prompt) - 1 : -1]
        best, ids = logits.log_softmax(-1).topk(4, dim=-1)
        assert torch.equal(ids, lesson.ids.long())
        torch.testing.assert_close(best, lesson.logp.float(), atol=2e-3, rtol=2e-3)
        if self_study.kind(index) in (self_study.RECALL, self_study.COMPLETION):
            assert lesson.answer.tolist() == bytewise(_sentence_of(chunks, index))["input_ids"][:5]
            quoted += 1
        else:
            assert lesson.answer.tolist() == ids[:, 0].tolist(), "answers are greedy"
    assert 0 < quoted < len(lessons)


def _sentence_of(chunks, index):
    return chunks.passage(index) if self_study.kind(index) == self_study.RECALL else chunks.to_complete(index)[0]


def _question_of(model, tokenizer, chunks, index):
    """The question of conversation ``index``, asked alone and without a cache of chunks."""
    from accel.distill.teacher import Generation, answers
    from accel.models.softmax_target import SoftmaxTarget

    kind = self_study.kind(index)
    if kind == self_study.COMPLETION:
        found = chunks.to_complete(index)
        return None if found is None else f'Complete this sentence from the text: "{found[1]}"'
    seed = self_study.SEEDS["question" if kind == self_study.RECALL else kind]
    begins = random.Random(f"{HOW.seed}/begins/{index}").choice(seed.begins)
    told = seed.told.format(passage=chunks.passage(index))
    head = document_ids(tokenizer, chunks.text(index // 4), "text", "Read this. ")
    prompt = head + query_ids(tokenizer, [{"role": "user", "content": told}], "text") + tokenizer(begins)["input_ids"]
    way = Generation(HOW.question_tokens, HOW.question_temperature, HOW.seed, [0], k=1)
    place = [i for i in range(13) if self_study.kind(i) != self_study.COMPLETION].index(index)
    (lesson,) = answers(SoftmaxTarget(model), [(place, prompt)], way)
    return begins + self_study._clean(tokenizer, lesson.answer)


def test_a_killed_run_goes_on_to_the_same_conversations(model, bytewise, tmp_path, monkeypatch):
    whole = run(model, bytewise, tmp_path / "whole")
    from accel.distill import lessons as shelves

    monkeypatch.setattr(shelves, "SHARD", 3)
    calls = []
    original = self_study.document.read

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(self_study.document, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, bytewise, tmp_path / "killed")
    assert same(run(model, bytewise, tmp_path / "killed"), whole)
    # nothing is made twice
    calls.clear()
    assert same(run(model, bytewise, tmp_path / "killed"), whole) and not calls


def test_other_choices_do_not_go_on_in_the_same_folder(model, bytewise, tmp_path):
    from dataclasses import replace

    from accel.errors import ArtifactError

    run(model, bytewise, tmp_path)
    with pytest.raises(ArtifactError, match="was made with answer_tokens=5, this run has 6"):
        run(model, bytewise, tmp_path, replace(HOW, answer_tokens=6))
    with pytest.raises(ArtifactError, match="was made with document="):
        run(model, bytewise, tmp_path, corpus=replace(CORPUS, text=TEXT + "More."))


def test_chunks_and_passages_come_from_everywhere_and_are_repeatable(bytewise):
    how = Study(conversations=400, shortest_chunk=60, longest_chunk=90, per_chunk=4)
    text = " ".join(f"Fact {i:03} is that it is so." for i in range(50))
    corpus = Corpus("x", text, "text", "")
    chunks = Chunks(bytewise, corpus, how)
    pieces = [chunks.text(number) for number in range(100)]
    assert pieces == [Chunks(bytewise, corpus, how).text(n) for n in range(100)]
    assert all(60 <= len(piece) <= 90 and piece in text for piece in pieces)
    covered = set().union(*({*range(text.index(p), text.index(p) + len(p))} for p in pieces))
    assert len(covered) > 0.95 * len(text)
    passages = [chunks.passage(i) for i in range(80)]
    assert all(
        each in chunks.text(i // 4) and each.startswith("Fact") and each.endswith(".")
        for i, each in enumerate(passages)
    )
    assert len(set(passages)) > 30
    for sentence, beginning in map(chunks.to_complete, range(80)):
        assert sentence in passages or sentence in text
        assert sentence.startswith(f"{beginning} ") and 4 <= len(beginning.split()) <= 5
    recalled = [chunks.passage(i) for i in range(80) if self_study.kind(i) == self_study.RECALL]
    assert all(each.count("Fact") == 1 for each in recalled)
    short = Chunks(bytewise, Corpus("x", "Too short. And so. Is this.", "text", ""), how)
    assert short.to_complete(0) is None and short.passage(0)


@pytest.mark.parametrize(
    ("said", "kept"),
    [(" is it? And more", " is it?"), (' is it"', " is it"), (" a\nb?", " a"), ("", "")],
)
def test_a_question_ends_where_it_is_asked(bytewise, said, kept):
    assert self_study._clean(bytewise, torch.tensor(bytewise(said)["input_ids"], dtype=torch.int64)) == kept


def test_all_five_kinds_are_asked():
    quoted = {self_study.RECALL, self_study.COMPLETION}
    assert set(self_study._KINDS) == {*self_study.SEEDS, *quoted} and len(self_study.SEEDS) == 5


def test_headings_are_no_facts(bytewise):
    text = "First.\n\nThe garden\n\nThe pear tree was planted by a sailor. It has six beehives in it.\n\nLast."
    chunks = Chunks(bytewise, Corpus("x", text, "text", ""), Study(conversations=40, per_chunk=40))
    said = {chunks.passage(index) for index in range(40)}
    assert said and not any("The garden" in each for each in said)


def test_an_answer_ends_before_it_runs_in_circles():
    def answer(*tokens):
        count = len(tokens)
        view = torch.arange(count * 2).view(count, 2)
        lesson = Lesson(0, torch.tensor([1]), torch.tensor(tokens), view, view.half())
        kept = self_study._before_loops(lesson)
        assert len(kept.answer) == len(kept.ids) == len(kept.logp)
        assert torch.equal(kept.ids, view[: len(kept.answer)])
        return kept.answer.tolist()

    once = list(range(10))
    assert answer(*once) == once and answer(5, 5, 5) == [5, 5, 5]
    assert answer(*once, *once) == once
    assert answer(7, 8, *once, 9, *once[:8], 3) == [7, 8, *once, 9]
    assert answer(*[4] * 20) == [4]


def test_long_lessons_are_cut_and_those_without_room_left_out(model, bytewise, tmp_path):
    lessons = run(model, bytewise, tmp_path)
    longest = max(len(each.prompt) for each in lessons) + 2
    kept = cut(lessons, longest)
    assert all(len(each.prompt) + len(each.answer) <= longest for each in kept)
    assert all(len(each.answer) == len(each.ids) == len(each.logp) for each in kept)
    assert len(cut(lessons, min(len(each.prompt) for each in lessons))) == 0


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"conversations": 0}, "conversations=0"),
        ({"shortest_chunk": 50, "longest_chunk": 40}, "longest_chunk=40: must be shortest_chunk=50 or more"),
        ({"per_chunk": 0}, "per_chunk=0"),
    ],
)
def test_bad_choices_are_refused(choice, match):
    with pytest.raises(OptionError, match=match):
        Study(**choice)


def test_what_is_stated_beforehand_is_enough(model, bytewise, tmp_path):
    run(model, bytewise, tmp_path)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert used <= HOW.predicted_bytes() + 4096  # the index files name the model
