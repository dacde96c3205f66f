"""Answers of the model itself: as decoding alone gives them, ended or cut, kept where right, resumed where killed."""

from __future__ import annotations

import pytest
import torch

from accel.distill.prompts import Encoded
from accel.errors import ArtifactError, OptionError
from accel.methods.dparallel.distill import trajectories
from accel.methods.dparallel.distill.trajectories import answers, from_file, keep, lesson, self_written
from accel.methods.dparallel.options import DParallelOptions
from accel.models.diffusion import Denoiser, DiffusionFacts
from accel.types import Stats

# the random model of the fixture says token 58 to some prompts
EOS, MASK = 58, 66
FACTS = DiffusionFacts(mask_token=MASK, block_length=4, stop_tokens=(EOS,), threshold=2.0)
PROMPTS = [[5, 9, 11], [7], [12, 30, 31, 40], [8, 8], [20, 21]]


@pytest.fixture
def denoiser(tiny):
    """A model whose answers differ in length: masks that weigh little leave prompts something to say."""
    model = tiny.build("llama", seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[MASK] *= 0.2
    return Denoiser(model, FACTS)


def sequential(denoiser, prompt, length):
    """The entropy rule one position at a time, on a row alone."""
    row = [*prompt, *[MASK] * length]
    for start in range(len(prompt), len(row), FACTS.block_length):
        block = range(start, start + FACTS.block_length)
        while left := [place for place in block if row[place] == MASK]:
            (logits,) = denoiser.logits([torch.tensor(row)], [torch.tensor(left)])
            logits[:, MASK] = -torch.inf
            p = logits.double().softmax(-1)
            entropies = torch.special.entr(p).sum(-1)
            best = int(entropies.argmin())
            for i, place in enumerate(left):
                if i == best or entropies[i] <= FACTS.threshold:
                    row[place] = int(logits[i].argmax())
    answer = row[len(prompt) :]
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_are_those_of_rows_decoded_alone(denoiser, rows):
    stats = Stats()
    found = {each.index: each for each in answers(denoiser, enumerate(PROMPTS), DParallelOptions(), 12, rows, stats)}
    assert sorted(found) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        assert found[index].prompt.tolist() == prompt
        assert found[index].answer.tolist() == sequential(denoiser, prompt, 12)
    ends = [int(each.answer[-1]) == EOS for each in found.values()]
    assert any(ends) and not all(ends), "the fixture ends some answers and cuts others"
    assert stats.generated_tokens == sum(len(each.answer) for each in found.values())
    # never more than one forward a token, nor fewer than one a block that was entered
    entered = sum(-(-len(each.answer) // FACTS.block_length) for each in found.values())
    assert entered <= stats.row_calls < sum(4 * -(-len(each.answer) // 4) for each in found.values())


def test_what_is_kept_ends_and_is_right(bytewise):
    def said(index, text, end=True):
        ids = bytewise(text)["input_ids"]
        return lesson(index, [1], [*ids, 0] if end else ids)

    written = [said(0, "3+4=7"), said(1, "3+4=8"), said(2, "3+4=7", end=False), said(3, "")]
    known = ["7"] * 4
    kept = keep(written, (0,), bytewise, known)
    assert [each.index for each in kept.lessons] == [0]
    assert kept.as_dict() == {"written": 4, "kept": 1, "cut": 1, "wrong": 2}
    assert [each.index for each in keep(written, (0,), bytewise, None).lessons] == [0, 1, 3]


def test_a_killed_run_goes_on_and_another_model_is_refused(denoiser, tmp_path, monkeypatch):
    asked = Encoded(PROMPTS, [None] * 5, [str(i) for i in range(5)])
    monkeypatch.setattr("accel.distill.lessons.SHARD", 2)

    def run(folder, base, given=denoiser):
        made = self_written(given, asked, DParallelOptions(), 12, 2, folder, base, 10**6)
        return {each.index: each.answer.tolist() for each in made}

    whole = run(tmp_path / "whole", {"model": "a"})
    real = trajectories.answers
    asked_for = []

    def watched(denoiser, prompts, *rest):
        listed = list(prompts)
        asked_for.append([index for index, _ in listed])
        for count, each in enumerate(real(denoiser, listed, *rest)):
            if len(asked_for) == 1 and count == 3:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(trajectories, "answers", watched)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", {"model": "a"})
    assert run(tmp_path / "killed", {"model": "a"}) == whole
    assert len(asked_for[0]) == 5 and len(asked_for[1]) == 3
    assert run(tmp_path / "killed", {"model": "a"}) == whole and len(asked_for) == 2
    with pytest.raises(ArtifactError, match="was made with model='a', this run has 'b'"):
        run(tmp_path / "killed", {"model": "b"})


def test_the_files_answers_must_all_be_there():
    full = Encoded([[1], [2]], [[3, 0], [4, 0]], ["a", "b"])
    assert [each.answer.tolist() for each in from_file(full)] == [[3, 0], [4, 0]]
    with pytest.raises(OptionError, match="1 of 2 prompts have no answer"):
        from_file(Encoded([[1], [2]], [[3, 0], None], ["a", "b"]))
