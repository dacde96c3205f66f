"""Training of cartridges: the loss by brute force, gradients, resumption; what serves is what was trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel.distill import forward
from accel.distill.batches import collate
from accel.distill.forward import Scorer
from accel.distill.teacher import Lesson
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.distill.slots import Slots, begin, inputs
from accel.methods.cartridge.distill.train import Curriculum, Training, loss, train
from accel.models.softmax_target import SoftmaxTarget

VOCAB = 67
HOW = Training(steps=6, batch_tokens=64, checkpoint_every=2, learning_rate=0.05)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """Some processors multiply in bf16 where they may: what is compared here must not depend on the machine."""
    monkeypatch.setattr(forward, "_multiplies_bf16", lambda: False)


def text(length, seed):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def lessons_of(model, doc, count, *, k=VOCAB, seed=50):
    """What the model with the document in its prompt says behind random questions, and thinks, brute force."""
    made = []
    for index in range(count):
        prompt, answer = text(3 + index % 3, seed + index), text(4, seed + 100 + index)
        with torch.no_grad():
            logits = model(torch.tensor([doc + prompt + answer])).logits[0, len(doc) + len(prompt) - 1 : -1]
        best, ids = logits.log_softmax(-1).topk(k, dim=-1)
        made.append(
            Lesson(
                index,
                torch.tensor(prompt, dtype=torch.int32),
                torch.tensor(answer, dtype=torch.int32),
                ids.int(),
                best.half(),
            )
        )
    return made


def logits_behind(model, members, prompt, answer):
    """transformers alone: the keys and values in a cache of its own, one row."""
    tokens = torch.tensor([prompt + answer[:-1]])
    return model(tokens, **inputs(members, tokens, model.dtype)).logits[0, len(prompt) - 1 :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_whole_document_has_nothing_to_learn(tiny, family):
    model, _ = tiny.pair(family)
    doc = text(20, 1)
    batch = collate(lessons_of(model, doc, 4))
    whole, half = (Slots(document.read(model, ids), 1) for ids in (doc, doc[:10]))
    with torch.no_grad():
        # the teacher's log-probabilities are stored in half precision
        assert float(loss(Scorer(model), [whole], batch)) < 2e-3
        assert float(loss(Scorer(model), [half], batch)) > 0.1


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_loss_is_the_divergence_summed_over_a_list_and_averaged_over_tokens(tiny, k):
    """Explicitly: listed tokens, and all others as one event, never divided by how many are listed."""
    model, _ = tiny.pair("llama")
    doc = text(20, 1)
    lessons = lessons_of(model, doc, 3, k=k)
    slots = Slots(document.read(model, doc[:8]), 1)
    terms = []
    for each in lessons:
        with torch.no_grad():
            q = logits_behind(model, [slots], each.prompt.tolist(), each.answer.tolist()).softmax(-1).double()
        for position in range(len(each.answer)):
            p, ids = each.logp[position].double().exp(), each.ids[position].long()
            listed = (p * (p / q[position, ids]).log()).sum()
            rest_p, rest_q = 1 - p.sum(), 1 - q[position, ids].sum()
            terms.append(float(listed + (rest_p * (rest_p / rest_q).log() if k < VOCAB else 0)))
    expected = sum(terms) / len(terms)
    with torch.no_grad():
        found = float(loss(Scorer(model), [slots], collate(lessons)))
        # twice the tokens, the same mean
        assert float(loss(Scorer(model), [slots], collate(lessons * 2))) == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(expected, rel=5e-3, abs=1e-4)


def test_gradients_are_those_of_finite_differences(tiny):
    model = tiny.build("llama")
    slots = Slots(document.read(model, text(8, 1)), 1)
    batch = collate(lessons_of(model, text(20, 1), 2))
    scorer = Scorer(model)
    loss(scorer, [slots], batch).backward()
    for weight, place in ((slots.keys[0], (1, 3, 2)), (slots.values[1], (0, 6, 5))):
        step = 1e-2
        with torch.no_grad():
            weight[place] += step
            above = float(loss(scorer, [slots], batch))
            weight[place] -= 2 * step
            below = float(loss(scorer, [slots], batch))
            weight[place] += step
        assert float(weight.grad[place]) == pytest.approx((above - below) / (2 * step), rel=5e-2, abs=2e-4)


def test_what_serves_is_what_was_trained(tiny):
    """transformers' cache with its mask and positions, against the rows that serve."""
    for family in ("llama", "qwen3", "gemma3_text"):
        model, _ = tiny.pair(family)
        members = [Slots(document.read(model, text(size, size)), 1) for size in (9, 5)]
        prompt, answer = text(4, 7), text(5, 8)
        with torch.no_grad():
            trained = logits_behind(model, members, prompt, answer)
        target = SoftmaxTarget(model)
        row = target.open([each.segment(model.dtype) for each in members])
        served = target.forward(torch.tensor([prompt + answer[:-1]]), [row])[0, len(prompt) - 1 :]
        torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-4)


def test_the_sink_stays_and_the_rest_learns(tiny, tmp_path):
    model, _ = tiny.pair("llama")
    doc = text(20, 1)
    before = document.read(model, doc[:8])
    slots = Slots(before, 2)
    weights = [each.clone() for each in model.parameters()]
    rows = train(model, [slots], [lessons_of(model, doc, 6)], replace(HOW, steps=40), tmp_path)
    after = slots.segment(torch.float32)
    for one, other in zip(after.keys + after.values, before.keys + before.values, strict=True):
        assert torch.equal(one[:, :2], other[:, :2])
        assert not torch.equal(one[:, 2:], other[:, 2:])
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(each.requires_grad for each in model.parameters()) and all(p.grad is None for p in model.parameters())


def test_a_killed_run_goes_on_to_the_same_losses(tiny, tmp_path):
    model, _ = tiny.pair("llama")
    doc = text(20, 1)
    lessons = lessons_of(model, doc, 6)

    def fresh():
        return Slots(document.read(model, doc[:8]), 1)

    whole = train(model, [fresh()], [lessons], HOW, tmp_path / "whole")

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, [fresh()], [lessons], HOW, tmp_path / "killed", progress=stop)
    again = fresh()
    rest = train(model, [again], [lessons], HOW, tmp_path / "killed")
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole]


def test_several_documents_learn_alone_and_together(tiny, tmp_path):
    model, _ = tiny.pair("llama")
    docs = [text(20, 1), text(14, 5)]
    lessons = [lessons_of(model, doc, 5, seed=60 * place) for place, doc in enumerate(docs)]
    curriculum = Curriculum(lessons, replace(HOW, steps=60))
    members = [tuple(curriculum[step][1]) for step in range(60)]
    assert {(0,), (1,), (0, 1), (1, 0)} == set(members)
    assert members == [tuple(Curriculum(lessons, replace(HOW, steps=60))[step][1]) for step in range(60)]
    uneven = Curriculum([lessons[0], lessons[1][:1]], replace(HOW, steps=600, together=0))
    assert 440 < sum(uneven[step][1] == [0] for step in range(600)) < 560  # 5 lessons to 1
    slots = [Slots(document.read(model, doc[:7]), 1) for doc in docs]

    def joint():
        with torch.no_grad():
            return float(loss(Scorer(model), slots, collate(lessons[0] + lessons[1])))

    before = joint()
    train(model, slots, lessons, replace(HOW, steps=60), tmp_path)
    assert joint() < 0.7 * before


def test_starts(tiny):
    model, _ = tiny.pair("llama")
    doc = text(100, 1)
    first = begin(model, doc, 10, "first", 1, 0)
    assert torch.equal(first.keys[0], document.read(model, doc[:10]).keys[0])
    spread = begin(model, doc, 70, "chunks", 1, 0)
    ids = doc[:24] + doc[38:61] + doc[77:]  # 24, 23 and 23 tokens: the beginning, the middle, the end
    assert torch.equal(spread.values[1], document.read(model, ids).values[1])
    noise = begin(model, doc, 10, "random", 2, 0)
    assert torch.equal(noise.keys[0][:, :2], first.keys[0][:, :2])
    assert not torch.equal(noise.keys[0][:, 2:], first.keys[0][:, 2:])
    assert 0.5 < float(noise.keys[0].std() / first.keys[0].std()) < 2
    assert torch.equal(noise.keys[0], begin(model, doc, 10, "random", 2, 0).keys[0])
    with pytest.raises(OptionError, match="unknown start 'middle'"):
        begin(model, doc, 10, "middle", 1, 0)
    with pytest.raises(OptionError, match="has only 100"):
        begin(model, doc, 101, "first", 1, 0)
    with pytest.raises(OptionError, match="sink_tokens=10"):
        begin(model, doc, 10, "first", 10, 0)


@pytest.mark.parametrize("choice", [{"steps": 0}, {"learning_rate": 0}, {"together": 1.5}, {"clip": -1}])
def test_bad_choices_are_refused(choice):
    with pytest.raises(OptionError, match=next(iter(choice))):
        Training(**choice)
