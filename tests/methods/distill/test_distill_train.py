"""Training: learns what it is taught, resumes to the same losses, keeps what it needs and refuses what is broken."""

from __future__ import annotations

import json

import pytest
import torch

from accel.distill import forward
from accel.distill.batches import Lessons, collate
from accel.distill.forward import Scorer
from accel.distill.teacher import Lesson
from accel.errors import ArtifactError, ModelError, OptionError
from accel.methods.speculative.distill.measure import measure
from accel.methods.speculative.distill.train import Training, next_token, train

V = 67


def rule_lessons(count=64, length=12, k=3):
    """A language that can be learned: each token is followed by the next one (p = 0.8) or the one behind it (0.15)."""
    generator = torch.Generator().manual_seed(5)
    lessons = []
    for index in range(count):
        text = [int(torch.randint(3, V, (), generator=generator))]
        while len(text) < length + 3:
            hop = 1 if float(torch.rand((), generator=generator)) < 0.84 else 2
            text.append((text[-1] + hop) % V)
        prompt, answer = torch.tensor(text[:3], dtype=torch.int32), torch.tensor(text[3:], dtype=torch.int32)
        before = torch.tensor(text[2:-1])
        ids = torch.stack([(before + hop) % V for hop in (1, 2, 3)], -1).int()[:, :k]
        logp = torch.tensor([0.8, 0.15, 0.04]).log().half().expand(length, 3)[:, :k]
        lessons.append(Lesson(index, prompt, answer, ids, logp))
    return lessons


@pytest.fixture
def source():
    return Lessons(rule_lessons(), budget=160, seed=1)


@pytest.fixture
def student(tiny):
    def make(seed=2, **extra):
        return tiny.build("llama", seed=seed, **extra)

    return make


def test_what_the_list_does_not_hold_is_learned_from_the_targets_own_answers(tmp_path, student):
    """With one listed token, the second most likely one is in the rest: only the answers say which it is."""
    batch = collate(rule_lessons(80)[64:])
    found = {}
    for by_target in (False, True):
        lessons = Lessons(rule_lessons(k=1), 160, seed=1, by_target=by_target)
        model = student()
        train(model, lessons.batch, Training(steps=100, loss="fkl", learning_rate=1e-2), tmp_path / str(by_target))
        said = Scorer(model)(batch.tokens, batch.at).softmax(-1)
        found[by_target] = float(said.detach().gather(-1, batch.ids[:, 1:2]).mean())
    assert found[True] > 0.08 > 0.04 > found[False]  # 0.15 in truth


@pytest.mark.parametrize(("loss", "baseline"), [("fkl", False), ("lk", False), ("fkl", True)])
def test_a_student_learns(tmp_path, source, student, loss, baseline):
    model = student()
    held_out = [collate(rule_lessons(80)[64:])]
    before = measure(model, held_out, sampled=True)
    how = Training(steps=50, loss=loss, baseline=baseline, learning_rate=1e-2)
    rows = train(model, source.batch, how, tmp_path)
    after = measure(model, held_out, sampled=True)
    assert before.acceptance < 0.3 and after.acceptance > 0.6
    assert after.top1 > 0.8
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_prompts_teach_nothing_and_answers_all(tmp_path, source, student, monkeypatch):
    """Gradients come from answer positions: a batch's loss is the mean over its answer tokens."""
    monkeypatch.setattr(forward, "_multiplies_bf16", lambda: False)
    model = student()
    batch = source.batch(0)
    logits = model(batch.tokens).logits.flatten(0, 1)[batch.at].detach()
    rows = train(model, source.batch, Training(steps=1, loss="fkl"), tmp_path)
    log_q = logits.float().log_softmax(-1)
    p = batch.logp.exp()
    rest = 1 - p.sum(-1)
    q = log_q.gather(-1, batch.ids).exp()
    expected = (p * (batch.logp - q.log())).sum(-1) + rest * (rest.log() - (1 - q.sum(-1)).log())
    assert rows[0]["loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert rows[0]["tokens"] == sum(batch.lengths)


class Killed(Exception):
    pass


def killed_at(step):
    def progress(row):
        if row["step"] == step:
            raise Killed

    return progress


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, source, student, dropout):
    how = Training(steps=12, loss="tvd", checkpoint_every=3)
    whole_model, model = student(attention_dropout=dropout), student(attention_dropout=dropout)
    torch.manual_seed(1)
    whole = train(whole_model, source.batch, how, tmp_path / "whole")
    with pytest.raises(Killed):
        train(model, source.batch, how, tmp_path / "killed", progress=killed_at(7))
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 8, "los')  # what a kill leaves
    fresh = student(seed=9, attention_dropout=dropout)  # all that counts comes from the checkpoint
    torch.manual_seed(2)
    taken = []
    resumed = train(fresh, source.batch, how, tmp_path / "killed", progress=lambda row: taken.append(row["step"]))
    assert taken == list(range(6, 12))
    for key in ("step", "loss", "acceptance", "norm", "learning_rate"):
        assert [row[key] for row in resumed] == [row[key] for row in whole]
    for name, weight in whole_model.state_dict().items():
        assert torch.equal(weight, fresh.state_dict()[name]), name
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(12))


def test_a_finished_run_is_not_repeated(tmp_path, source, student):
    how = Training(steps=4)
    first = train(student(), source.batch, how, tmp_path)
    again = train(student(seed=3), source.batch, how, tmp_path, progress=killed_at(0))
    assert again == first


def test_the_last_two_checkpoints_are_kept(tmp_path, source, student):
    train(student(), source.batch, Training(steps=9, checkpoint_every=2), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    stems = ["step-00000008", "step-00000009"]
    assert names == ["log.jsonl", *(f"{stem}.{end}" for stem in stems for end in ("json", "safetensors"))]


@pytest.mark.parametrize("damage", ["weights", "json", "missing"])
def test_a_broken_checkpoint_is_named_and_refused(tmp_path, source, student, damage):
    how = Training(steps=4, checkpoint_every=2)
    train(student(), source.batch, how, tmp_path)
    path = tmp_path / "step-00000004.safetensors"
    if damage == "weights":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "json":
        path = path.with_suffix(".json")
        path.write_text("{")
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=path.name):
        train(student(), source.batch, how, tmp_path)
    path.with_suffix(".json").unlink()
    rows = train(student(), source.batch, how, tmp_path)  # the one before is still there
    assert len(rows) == 4


def test_a_folder_of_another_run_is_refused(tmp_path, source, student):
    train(student(), source.batch, Training(steps=2), tmp_path, made_from={"data": "a"})
    with pytest.raises(ArtifactError, match=r"learning_rate=0\.001, this run has 0\.5"):
        train(student(), source.batch, Training(steps=2, learning_rate=0.5), tmp_path, made_from={"data": "a"})
    with pytest.raises(ArtifactError, match="data='a', this run has 'b'"):
        train(student(), source.batch, Training(steps=2), tmp_path, made_from={"data": "b"})


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, source, student):
    model = student()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="step 0: the loss is nan"):
        train(model, source.batch, Training(steps=2), tmp_path)


def test_the_chosen_tokens_are_those_that_a_reference_finds_easier(tmp_path, source, student):
    reference = student(seed=4)
    train(reference, source.batch, Training(steps=30, learning_rate=5e-3), tmp_path / "reference")
    rows = train(student(), source.batch, Training(steps=2, keep=0.25), tmp_path / "a", reference=reference)
    assert rows[0]["tokens"] == -(-sum(source.batch(0).lengths) // 4)
    with pytest.raises(OptionError, match="needs a reference draft"):
        train(student(), source.batch, Training(steps=2, keep=0.25), tmp_path / "b")


def test_next_token_loss_leaves_out_what_the_draft_cannot_say():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    losses, counts = next_token(logits, torch.tensor([2, -1, 4]))
    assert counts.tolist() == [True, False, True]
    assert float(losses[2]) == pytest.approx(-float(logits[2].log_softmax(-1)[4]))


def test_the_rate_rises_and_falls():
    how = Training(steps=100, learning_rate=1.0, warmup=0.1, floor=0.2)
    rates = [how.rate(step) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.2, abs=1e-3)
    )
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss": "l2"}, "unknown loss 'l2': choose from"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"baseline": True, "keep": 0.5}, "baseline with keep"),
    ],
)
def test_bad_settings_are_one_line(given, says):
    with pytest.raises(OptionError, match=says) as caught:
        Training(**given)
    assert "\n" not in str(caught.value)
