"""Batches: what they hold, that their order depends on the seed alone, mixes, and the student's own answers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from accel.distill.batches import Lessons, Packing, collate
from accel.distill.forward import Scorer
from accel.distill.teacher import Generation, Lesson, judge_all
from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError
from accel.methods.speculative.distill.data import Mix, Mixture, OnPolicy, Translation

V = 67


def lesson(index, prompt, answer, k=3):
    ids = torch.stack([(torch.tensor(answer) + hop) % V for hop in range(k)], -1).int()
    logp = torch.tensor([0.7, 0.2, 0.05])[:k].log().half().expand(len(answer), k)
    as_ids = [torch.tensor(each, dtype=torch.int32) for each in (prompt, answer)]
    return Lesson(index, *as_ids, ids, logp)


def test_a_batch_holds_what_foretells_each_answer_token():
    batch = collate([lesson(0, [5, 6, 7], [8, 9]), lesson(1, [10], [11, 12, 13, 14])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [10, 11, 12, 13]]
    assert batch.tokens.flatten()[batch.at].tolist() == [7, 8, 10, 11, 12, 13]
    assert batch.answer.tolist() == [8, 9, 11, 12, 13, 14]
    assert batch.lengths == (2, 4)
    assert torch.equal(batch.ids[:, 0], batch.answer)
    torch.testing.assert_close(batch.logp[0].exp(), torch.tensor([0.7, 0.2, 0.05]), rtol=1e-3, atol=0)


def test_translation_marks_what_the_draft_cannot_say():
    vocabulary = VocabularyMap(torch.tensor([2, 7, 8, 9, 20]), 4, V)
    translation = Translation(vocabulary)
    batch = translation(collate([lesson(0, [5, 6, 7], [8, 30])]))
    assert batch.tokens.tolist() == [[4, 4, 1, 2]]
    assert batch.answer.tolist() == [2, -1]
    assert batch.ids.tolist() == [[2, 3, -1], [-1, -1, -1]]
    assert translation.read([7, 30]) == [1, 4]
    assert translation.to_target(torch.tensor([1, 4])) == [7, 20]
    assert translation.say([2, 3, 9]) == [0, 3]
    whole = Translation(None)
    assert whole.read([3]) == whole.say([3]) == whole.to_target(torch.tensor([3])) == [3]


def test_packing_takes_every_item_once_an_epoch_within_the_budget():
    lengths = torch.randint(1, 40, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    packing = Packing(lengths, budget=100, seed=4)
    for epoch in range(3):
        batches = packing.epoch(epoch)
        assert sorted(item for batch in batches for item in batch) == list(range(101))
        assert all(len(batch) * max(lengths[item] for item in batch) <= 100 for batch in batches)
    padded = sum(len(batch) * max(lengths[item] for item in batch) for batch in packing.epoch(0))
    assert padded < 1.25 * sum(lengths)
    assert packing.epoch(0) != packing.epoch(1)
    assert {frozenset(batch) for batch in packing.epoch(0)} != {frozenset(batch) for batch in packing.epoch(1)}


def test_a_batch_is_a_function_of_seed_and_number():
    lengths = [1 + i % 9 for i in range(50)]
    counted = [Packing(lengths, 30, seed=1)[number] for number in range(30)]
    late = Packing(lengths, 30, seed=1)
    assert [late[number] for number in (29, 3, 17)] == [counted[number] for number in (29, 3, 17)]
    assert [Packing(lengths, 30, seed=2)[number] for number in range(30)] != counted
    lessons = [lesson(index, [5, 6], [7] * (1 + index % 5)) for index in range(20)]
    one, other = Lessons(lessons, 20, seed=0), Lessons(lessons[::-1], 20, seed=0)
    for number in range(12):
        assert torch.equal(one.batch(number).tokens, other.batch(number).tokens)


def test_a_lesson_over_the_budget_is_refused():
    with pytest.raises(OptionError, match="batch_tokens=10: the longest lesson has 12 tokens"):
        Packing([3, 12], budget=10, seed=0)
    with pytest.raises(OptionError, match="no lessons"):
        Packing([], budget=10, seed=0)


def test_mixes():
    assert Mix.parse("target").schedule(5, 0) == ["target"] * 5
    half = Counter(Mix.parse("target:1,draft:1").schedule(4000, 0))
    assert abs(half["target"] - 2000) < 150 and set(half) == {"target", "draft"}
    third = Counter(Mix.parse("fixed:0.2, target:0.4").schedule(6000, 1))
    assert abs(third["fixed"] - 2000) < 180
    change = Mix.parse("target>draft")
    plan = change.schedule(4000, 3)
    assert plan == change.schedule(4000, 3) != change.schedule(4000, 4)
    quarters = [plan[start : start + 1000].count("draft") / 1000 for start in range(0, 4000, 1000)]
    assert quarters == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.06)
    back = Mix.parse("draft>target").schedule(4000, 3)
    assert [back[start : start + 1000].count("draft") / 1000 for start in (0, 3000)] == pytest.approx(
        [0.875, 0.125], abs=0.06
    )
    assert Mix.parse("target:0,draft").sources == ["draft"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("web", "unknown data source 'web': choose from draft, fixed, target"),
        ("", "unknown data source ''"),
        ("target:x", "share ≥ 0"),
        ("target:-1", "share ≥ 0"),
        ("target:inf", "share ≥ 0"),
        ("target:1,target:2", "each source once"),
        ("target:0", "all shares are 0"),
        ("target>draft>fixed", "at most one '>'"),
    ],
)
def test_bad_mixes_are_one_line(text, says):
    with pytest.raises(OptionError, match=says):
        Mix.parse(text)


class Numbers:
    def __init__(self):
        self.asked = []

    def batch(self, number):
        self.asked.append(number)
        return number


def test_a_mixture_numbers_each_source_s_batches():
    target, draft = Numbers(), Numbers()
    mixture = Mixture({"target": target, "draft": draft}, Mix.parse("target>draft"), steps=40, seed=1)
    # a resumed run begins anywhere and asks for the same batches
    late = [mixture.batch(step) for step in range(25, 40)]
    target.asked.clear()
    draft.asked.clear()
    assert [mixture.batch(step) for step in range(40)][25:] == late
    assert target.asked == list(range(len(target.asked))) and draft.asked == list(range(len(draft.asked)))
    assert len(target.asked) + len(draft.asked) == 40 and target.asked and draft.asked


@pytest.mark.parametrize("trimmed", [False, True])
def test_the_student_writes_and_the_target_judges(tiny, trimmed):
    target = tiny.build("llama")
    kept = torch.arange(2, V, 2)
    vocabulary = VocabularyMap(kept, 5, V) if trimmed else None
    student = tiny.build("llama", seed=3, vocab_size=len(kept) if trimmed else V)
    translation = Translation(vocabulary)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 14]]
    how = Generation(max_new_tokens=6, temperature=0.0, stop_tokens=[2], k=4)
    source = OnPolicy(Scorer(target), student.train(), translation, prompts, how, budget=64)
    batch = source.batch(0)
    assert student.training and len(batch.lengths) == 3
    # greedy: each answer token is the student's argmax behind what it read
    read = translation(batch)
    with torch.no_grad():
        said = student(read.tokens).logits.flatten(0, 1)[batch.at].argmax(-1)
    assert torch.equal(torch.tensor(translation.to_target(said)), batch.answer)
    # and the lists are the target's
    with torch.no_grad():
        p = target(batch.tokens).logits.flatten(0, 1)[batch.at].log_softmax(-1)
    assert torch.equal(p.topk(4).indices, batch.ids)
    torch.testing.assert_close(p.topk(4).values, batch.logp, atol=5e-3, rtol=2e-3)


def test_sampled_student_answers_depend_on_seed_and_number_alone(tiny):
    target, student = tiny.build("llama"), tiny.build("llama", seed=3)
    prompts = [[5, 6, 7], [8, 9, 10], [12, 14, 15]]

    def make(seed, number):
        how = Generation(max_new_tokens=6, temperature=1.0, seed=seed)
        return OnPolicy(Scorer(target), student, Translation(None), prompts, how, budget=64).batch(number).tokens

    assert torch.equal(make(0, 1), make(0, 1))
    assert make(0, 0).tolist() != make(0, 1).tolist()
    assert make(0, 0).tolist() != make(1, 0).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_judging_in_a_batch_is_judging_alone(tiny, family):
    target = tiny.build(family)
    written = [(0, [5, 6, 7], [8, 9]), (4, [10], [11, 12, 13, 14, 15]), (2, [9, 9], [3])]
    together = judge_all(Scorer(target), written, 5)
    for each, one in zip(together, written, strict=True):
        index, prompt, answer = one
        with torch.no_grad():
            p = target(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert each.index == index and each.prompt.tolist() == prompt and each.answer.tolist() == answer
        assert torch.equal(each.ids.long(), p.topk(5).indices)
        torch.testing.assert_close(each.logp.float(), p.topk(5).values, atol=5e-3, rtol=2e-3)


def test_a_head_that_does_more_than_multiply_is_noticed(tiny):
    tokens, at = torch.arange(12).reshape(2, 6), torch.tensor([1, 5, 8])
    plain = tiny.build("llama")
    capped = tiny.build("llama")
    head = capped.lm_head

    class Capped(torch.nn.Module):
        """What a soft cap in the model's own forward looks like from outside."""

        def forward(self, input_ids, **kwargs):
            output = plain(input_ids, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    wrapped = Capped()
    wrapped.device = torch.device("cpu")
    wrapped.base_model = plain.base_model
    wrapped.get_output_embeddings = lambda: head
    assert Scorer(plain).plain_head and not Scorer(wrapped).plain_head
    for model in (plain, wrapped):
        expected = model(tokens).logits.flatten(0, 1)[at].detach()
        torch.testing.assert_close(Scorer(model)(tokens, at).detach(), expected)
        torch.testing.assert_close(torch.cat(list(Scorer(model).pieces(tokens, at, rows=2))), expected)
