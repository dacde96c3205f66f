"""Measures of a draft against brute force: agreement by position, and tokens a target call."""

from __future__ import annotations

import pytest
import torch

from accel.distill.batches import collate
from accel.distill.forward import Scorer
from accel.distill.teacher import judge_all
from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError
from accel.methods.speculative.distill.data import Translation
from accel.methods.speculative.distill.measure import block_efficiency, measure

GAMMAS = (1, 3, 5, 7)


def rounds_by_hand(agreed, gamma):
    """Greedy speculative decoding along a text, round by round."""
    place = rounds = 0
    while place < len(agreed):
        kept = 0
        while kept < gamma and place + kept < len(agreed) and agreed[place + kept]:
            kept += 1
        place += kept + 1
        rounds += 1
    return rounds


@pytest.mark.parametrize("gamma", GAMMAS)
def test_greedy_block_efficiency_counts_the_rounds(gamma):
    generator = torch.Generator().manual_seed(gamma)
    texts = [(torch.rand(n, generator=generator) < 0.7).float() for n in (1, 2, 9, 40)]
    expected = sum(len(text) for text in texts) / sum(rounds_by_hand(text.tolist(), gamma) for text in texts)
    assert block_efficiency(texts, gamma) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_sampled_block_efficiency_is_the_mean_over_draws(gamma):
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(12, generator=generator)
    draws = torch.rand(20000, 12, generator=generator) < chances
    mean = sum(rounds_by_hand(draw, gamma) for draw in draws.tolist()) / len(draws)
    assert block_efficiency([chances], gamma) == pytest.approx(12 / mean, rel=0.01)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_chance_everywhere_gives_the_closed_form(gamma):
    a = 0.6
    found = block_efficiency([torch.full((4000,), a)], gamma)
    assert found == pytest.approx((1 - a ** (gamma + 1)) / (1 - a), rel=2e-3)


@pytest.fixture
def judged(tiny):
    """A target, and its view (of the whole vocabulary) of random answers."""
    target = tiny.build("llama")
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    written = [(index, draw(4), draw(5 + index)) for index in range(4)]
    return target, written, judge_all(Scorer(target), written, k=tiny.VOCAB)


def test_measures_equal_brute_force(tiny, judged):
    target, written, lessons = judged
    student = tiny.draft_of(target, "partly")
    alphas, agreed = [], []
    with torch.no_grad():
        for _, prompt, answer in written:
            tokens = torch.tensor([prompt + answer[:-1]])
            p = target(tokens).logits[0, len(prompt) - 1 :].softmax(-1)
            q = student(tokens).logits[0, len(prompt) - 1 :].softmax(-1)
            alphas.append(1 - 0.5 * (p - q).abs().sum(-1))
            agreed.append((p.argmax(-1) == q.argmax(-1)).float())
    for sampled, along in ((True, alphas), (False, agreed)):
        # in two batches: padding and batches change nothing
        found = measure(student, [collate(lessons[:3]), collate(lessons[3:])], sampled=sampled, gammas=GAMMAS)
        assert found.positions == sum(len(answer) for _, _, answer in written)
        assert found.acceptance == pytest.approx(float(torch.cat(alphas).mean()), abs=2e-3)
        assert found.top1 == pytest.approx(float(torch.cat(agreed).mean()))
        for gamma in GAMMAS:
            assert found.block_efficiency[gamma] == pytest.approx(block_efficiency(along, gamma), abs=5e-3)
    assert 0 < found.top1 < 1


def test_the_target_itself_agrees_with_itself(judged):
    target, _, lessons = judged
    found = measure(target, [collate(lessons)], sampled=False)
    assert found.top1 == 1 and found.acceptance == pytest.approx(1, abs=2e-3)
    assert found.block_efficiency[7] > found.block_efficiency[1] > 1.5


def test_a_draft_cannot_be_right_about_tokens_it_has_no_id_for(tiny, judged):
    """α of a trimmed draft is at most the target's mass on the kept tokens; top-1 at most how often those lead."""
    _, _, lessons = judged
    kept = torch.arange(2, tiny.VOCAB, 2)
    student = tiny.build("llama", seed=1, vocab_size=len(kept))
    batch = Translation(VocabularyMap(kept, 0, tiny.VOCAB))(collate(lessons))
    found = measure(student, [batch], sampled=True)
    mass = (batch.logp.exp() * (batch.ids >= 0)).sum(-1).mean()
    assert found.acceptance <= float(mass) + 1e-3
    assert found.top1 <= float((batch.ids[:, 0] >= 0).float().mean())


def test_nothing_to_measure_is_refused(tiny):
    with pytest.raises(OptionError, match="no held-out answers"):
        measure(tiny.build("llama"), [], sampled=True)
