"""Training: what a step shows, what its loss is in plain PyTorch, that it is learned, and resumption bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from accel.distill import forward
from accel.distill.lora import Lora
from accel.distill.teacher import Lesson
from accel.errors import ArtifactError, ModelError, OptionError
from accel.methods.dparallel.distill.losses import entropy, without
from accel.methods.dparallel.distill.train import Canvases, Training, Views, filler, loss, measure, train
from accel.models.diffusion import Denoiser, DiffusionFacts

VOCAB, EOS, MASK = 67, 2, 66
FACTS = DiffusionFacts(mask_token=MASK, block_length=4, stop_tokens=(EOS,))
HOW = Training(steps=6, batch_tokens=128, checkpoint_every=2, learning_rate=2e-3, max_new_tokens=10, floor=1.0)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """Some processors multiply in bf16 where they may: what is compared here must not depend on the machine."""
    monkeypatch.setattr(forward, "_multiplies_bf16", lambda: False)


def lesson(index, prompt, answer):
    nothing = torch.empty(len(answer), 0)
    return Lesson(index, torch.tensor(prompt).int(), torch.tensor(answer).int(), nothing.int(), nothing.half())


def lessons(count=6):
    """A prompt's tokens, said again backwards."""
    made = []
    for index in range(count):
        size = 2 + index % 4
        prompt = torch.randint(3, 60, (size,), generator=torch.Generator().manual_seed(index)).tolist()
        made.append(lesson(index, prompt, [*reversed(prompt), EOS]))
    return made


@pytest.mark.parametrize("noise", ["blocks", "response", "diffusion", "maskgit", "block"])
def test_a_step_shows_canvases_with_masks_and_asks_for_what_they_hide(noise):
    given = lessons()
    canvases = Canvases(given, replace(HOW, noise=noise), FACTS)
    for step in range(12):
        views = canvases[step]
        labels = list(views.labels.split([len(each) for each in views.at]))
        assert len(views.rows) == len(views.at) == len(labels) and len(views.weight) == len(views.labels)
        for row, at, asked in zip(views.rows, views.at, labels, strict=True):
            (whose,) = [each for each in given if row[: len(each.prompt)].tolist() == each.prompt.tolist()]
            # ten tokens are three blocks of four; behind the end stands the end again
            whole = [*whose.answer.tolist(), *[EOS] * 12][:12]
            shown = row[len(whose.prompt) :]
            assert len(shown) == 12
            assert all(token in (MASK, true) for token, true in zip(shown.tolist(), whole, strict=True))
            assert (row[at] == MASK).all() and asked.tolist() == [whole[i - len(whose.prompt)] for i in at.tolist()]
            if noise not in ("blocks", "block"):
                assert int((shown == MASK).sum()) == len(at)
    assert canvases[3].rows[0].equal(Canvases(reversed(given), replace(HOW, noise=noise), FACTS)[3].rows[0])


def test_canvases_of_random_length_fit_the_answer():
    given = [lesson(0, [5, 6], [7, 8, 9, 10, EOS])]
    how = replace(HOW, canvas="random", noise="diffusion", max_new_tokens=16)
    sizes = {len(Canvases(given, how, FACTS)[step].rows[0]) - 2 for step in range(60)}
    assert sizes == {8, 12, 16}
    # an answer that fits no canvas is cut
    long = Canvases([lesson(0, [5], list(range(3, 33)))], how, FACTS)
    assert {len(long[step].rows[0]) - 1 for step in range(20)} == {16}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_loss_is_the_equation_on_logits_of_rows_alone(tiny, family, shift):
    """Each row alone, under a mask of zeros; the shift by hand."""
    model = tiny.build(family)
    facts = replace(FACTS, shift=shift)
    views = Canvases(lessons(), replace(HOW, noise="diffusion"), facts)[0]
    ce, certain, right = 0.0, [], 0
    for row, at, asked, weight in zip(
        views.rows,
        views.at,
        views.labels.split([len(each) for each in views.at]),
        views.weight.split([len(each) for each in views.at]),
        strict=True,
    ):
        with torch.no_grad():
            logits = model(row[None], attention_mask=torch.zeros(1, 1, len(row), len(row))).logits[0]
        asked_of = logits[at - 1] if shift else logits[at]
        logp = without(asked_of, MASK).log_softmax(-1)
        ce -= float((weight * logp.gather(-1, asked[:, None])[:, 0]).sum())
        hit = logp.argmax(-1) == asked
        right += int(hit.sum())
        certain += entropy(without(asked_of, MASK), 0.5)[hit].tolist()
    expected = ce / views.tokens + 2 * sum(certain) / max(len(certain), 1)
    with torch.no_grad():
        found = loss(Denoiser(model, facts), views, replace(HOW, beta=2.0))
    assert float(found.loss) == pytest.approx(expected, rel=1e-4)
    assert found.correct == pytest.approx(right / len(views.labels))


def test_a_step_that_hides_nothing_changes_nothing(tiny):
    denoiser = Denoiser(tiny.build("llama"), FACTS)
    nothing = torch.empty(0, dtype=torch.long)
    found = loss(denoiser, Views([torch.tensor([5, 6, 7])], [nothing], nothing, nothing.float(), 3), HOW)
    found.loss.backward()
    assert float(found.loss.detach()) == 0


@pytest.mark.parametrize("learner", ["whole", "lora"])
@pytest.mark.parametrize("noise", ["blocks", "diffusion"])
def test_it_learns_and_touches_nothing_else(tiny, tmp_path, learner, noise):
    model = tiny.build("llama", peak=0.3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    denoiser = Denoiser(model, FACTS)
    learns = model if learner == "whole" else Lora(model, rank=8, alpha=16.0)
    how = replace(HOW, steps=25, noise=noise, learning_rate=3e-3 if learner == "whole" else 2e-2, batch_tokens=256)
    start = measure(denoiser, lessons(), how)
    rows = train(denoiser, learns, lessons(), how, tmp_path)
    end = measure(denoiser, lessons(), how)
    assert end["cross_entropy"] < 0.8 * start["cross_entropy"] and end["correct"] > start["correct"]
    assert [row["step"] for row in rows] == list(range(25))
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert bool(changed) == (learner == "whole")
    assert all(weight.requires_grad for weight in model.parameters())


def test_certainty_forcing_lowers_the_entropy_of_what_is_right(tiny, tmp_path):
    """The paper's effect, on a toy that knows its answers already: cross entropy alone leaves it less sure."""
    model = tiny.build("llama", peak=0.3)
    how = replace(HOW, steps=30, beta=0.0, batch_tokens=256, learning_rate=3e-3)
    train(Denoiser(model, FACTS), model, lessons(), how, tmp_path / "start")
    found = {}
    for beta in (0.0, 2.0):
        learner = copy.deepcopy(model)
        denoiser = Denoiser(learner, FACTS)
        train(denoiser, learner, lessons(), replace(how, steps=12, beta=beta), tmp_path / str(beta))
        found[beta] = measure(denoiser, lessons(), how)
    assert found[2.0]["entropy_of_correct"] < 0.8 * found[0.0]["entropy_of_correct"]
    assert found[2.0]["correct"] > 0.7


@pytest.mark.parametrize("learner", ["whole", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(tiny, tmp_path, learner):
    class Killed(Exception):
        pass

    def run(folder, stop=None):
        model = tiny.build("llama")
        learns = model if learner == "whole" else Lora(model, rank=2, alpha=2.0)

        def watch(row):
            if row["step"] == stop:
                raise Killed

        return train(Denoiser(model, FACTS), learns, lessons(), HOW, folder, progress=watch), learns

    whole, reference = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop=4)
    resumed, learns = run(tmp_path / "killed")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert all(torch.equal(a, b) for a, b in zip(learns.parameters(), reference.parameters(), strict=True))
    with pytest.raises(ArtifactError, match="beta"):
        train(Denoiser(tiny.build("llama"), FACTS), reference, lessons(), replace(HOW, beta=0.5), tmp_path / "killed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps=0: must be 1 or more"),
        ({"learning_rate": 0.0}, "must be a positive number"),
        ({"beta": -1.0}, r"must be 0 \(cross entropy alone\) or more"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"floor": 1.5}, "from 0 to 1"),
        ({"noise": "all"}, "unknown noise 'all'"),
        ({"canvas": "short"}, "unknown canvas 'short'"),
    ],
)
def test_wrong_choices_are_refused(change, says):
    with pytest.raises(OptionError, match=says):
        replace(HOW, **change)


def test_what_cannot_be_trained_is_refused(tiny, tmp_path):
    with pytest.raises(OptionError, match="the longest lesson has 34 tokens"):
        Canvases(lessons(), replace(HOW, batch_tokens=30), FACTS)
    with pytest.raises(ModelError, match="an answer needs an end"):
        filler(replace(FACTS, stop_tokens=()))
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    denoiser = Denoiser.__new__(Denoiser)
    denoiser.__dict__.update(Denoiser(tiny.build("llama"), FACTS).__dict__ | {"model": model})
    with pytest.raises(ModelError, match="step 0: the loss is nan; lower the learning rate"):
        train(denoiser, model, lessons(), HOW, tmp_path)
