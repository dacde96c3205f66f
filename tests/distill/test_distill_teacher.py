"""The teacher: greedy answers equal transformers', sampled ones follow the target, rows do not disturb each other."""

from __future__ import annotations

import pytest
import torch

from accel.distill.forward import Scorer
from accel.distill.teacher import Generation, answers, judge_all, judge_rows, most_likely
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.models.softmax_target import SoftmaxTarget

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20, 21], [33, 34, 35, 36], [40, 41, 42], [50, 51]]


def answered(model, how, prompts=PROMPTS, indices=None):
    named = zip(indices or range(len(prompts)), prompts, strict=True)
    return {lesson.index: lesson for lesson in answers(SoftmaxTarget(model), named, how)}


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_greedy_answers_and_their_lists(tiny, rows):
    model = tiny.build("llama")
    how = Generation(max_new_tokens=8, stop_tokens=[tiny.EOS], k=5, rows=rows)
    found = answered(model, how)
    assert sorted(found) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        lesson = found[index]
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=tiny.PAD)
        assert lesson.prompt.tolist() == prompt
        assert lesson.answer.tolist() == expected[0, len(prompt) :].tolist()
        (seen,) = judge_all(Scorer(model), [(index, prompt, lesson.answer.tolist())], 5)
        assert torch.equal(seen.ids, lesson.ids) and torch.equal(lesson.ids[:, 0], lesson.answer)
        torch.testing.assert_close(seen.logp, lesson.logp, atol=5e-3, rtol=2e-3)


def test_answers_of_others_behind_contexts(tiny):
    """As transformers sees context, prompt and answer in one piece, whatever else is in the batch."""
    model = tiny.build("llama")
    contexts = [[3, 4, 5, 6, 7, 8], [], [60, 61]]
    said = [[8, 9, 10], [1], [30, 31, 32, 33, 34], [2, 2], [7], [6, 5]]
    written = [(index, *pair) for index, pair in enumerate(zip(PROMPTS, said, strict=True))]
    held = [document.read(model, each) if each else None for each in contexts]
    target = SoftmaxTarget(model)
    found = list(judge_rows(target, written, 4, 4, lambda i: [held[i % 3]] if held[i % 3] else []))
    assert [each.index for each in found] == list(range(6)) and not target.cache.rows
    for (index, prompt, answer), lesson in zip(written, found, strict=True):
        head = contexts[index % 3]
        with torch.no_grad():
            logits = model(torch.tensor([head + prompt + answer])).logits[0, len(head) + len(prompt) - 1 : -1]
        best, ids = logits.log_softmax(-1).topk(4, dim=-1)
        assert lesson.prompt.tolist() == prompt and lesson.answer.tolist() == answer
        assert torch.equal(lesson.ids.long(), ids)
        torch.testing.assert_close(lesson.logp.float(), best, atol=5e-3, rtol=2e-3)


def test_an_answer_depends_on_prompt_seed_and_index_alone(tiny):
    model = tiny.build("llama")
    whole = answered(model, Generation(max_new_tokens=6, temperature=1.0, rows=3))
    alone = answered(model, Generation(max_new_tokens=6, temperature=1.0, rows=1), PROMPTS[4:5], [4])
    assert whole[4].answer.tolist() == alone[4].answer.tolist()
    other_index = answered(model, Generation(max_new_tokens=6, temperature=1.0), PROMPTS[4:5], [7])
    other_seed = answered(model, Generation(max_new_tokens=6, temperature=1.0, seed=1), PROMPTS[4:5], [4])
    assert whole[4].answer.tolist() != other_index[7].answer.tolist()
    assert whole[4].answer.tolist() != other_seed[4].answer.tolist()


def test_sampled_tokens_follow_the_target(tiny):
    """Chi-square of first tokens over many indices, at temperature 2; 66 degrees of freedom, 99.9th percentile."""
    model = tiny.build("llama")
    n = 1500
    found = answered(model, Generation(max_new_tokens=1, temperature=2.0, rows=500, k=1), [PROMPTS[0]] * n)
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    seen = torch.stack([lesson.answer[0] for lesson in found.values()]).long().bincount(minlength=len(p))
    common = p * n >= 5
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    counted = torch.cat([seen[common], seen[~common].sum()[None]])
    assert float(((counted - expected) ** 2 / expected).sum()) < 107


def test_lists_are_log_probabilities_under_the_whole_vocabulary():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 4
    ids, logp = most_likely(logits, 6)
    expected = logits.log_softmax(-1).topk(6)
    assert ids.dtype == torch.int32 and logp.dtype == torch.float16
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(logp.float(), expected.values, atol=1e-3, rtol=1e-3)
    assert most_likely(logits, 99)[0].shape == (7, 50)


@pytest.mark.parametrize("given", [{"max_new_tokens": 0}, {"k": 0}, {"rows": 0}, {"temperature": -1.0}])
def test_bad_settings_are_refused(given):
    with pytest.raises(OptionError, match=next(iter(given))):
        Generation(**given)
