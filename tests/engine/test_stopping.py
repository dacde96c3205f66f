"""When a row is finished: each criterion by itself, several tokens at once, and criteria that compare rows."""

from __future__ import annotations

import pytest
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria

from accel.engine.stopping import CriteriaStopper, TogetherStopper
from accel.types import Emission

PROMPTS = torch.tensor([[0, 7, 8], [4, 5, 6]])


class Recorder(StoppingCriteria):
    """Remembers what it was shown; ends a row at ``token``."""

    def __init__(self, token: int = -1) -> None:
        self.token = token
        self.ids: list[list[list[int]]] = []
        self.scores: list[object] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.ids.append(input_ids.tolist())
        self.scores.append(scores)
        return input_ids[:, -1] == self.token


def test_length_is_counted_per_row() -> None:
    stopper = CriteriaStopper([MaxLengthCriteria(7)], PROMPTS, max_new_tokens=4)
    assert stopper.clip(Emission(0, [1, 2, 3])) == (3, False)
    assert stopper.clip(Emission(1, [1, 2, 3, 4, 5])) == (4, True)
    assert stopper.clip(Emission(0, [4, 5])) == (1, True)


def test_the_first_of_several_end_tokens_ends_a_row() -> None:
    stopper = CriteriaStopper([EosTokenCriteria([9, 2])], PROMPTS, max_new_tokens=20)
    assert stopper.eos == {2, 9}
    assert stopper.clip(Emission(0, [1, 3])) == (2, False)
    assert stopper.clip(Emission(0, [1, 2, 9, 4])) == (2, True)
    assert stopper.clip(Emission(1, [9])) == (1, True)


def test_nothing_ends_what_goes_on() -> None:
    stopper = CriteriaStopper([], PROMPTS, max_new_tokens=20)
    assert stopper.clip(Emission(0, [1, 2, 9])) == (3, False)
    assert stopper.clip(Emission(0, [])) == (0, False)


def test_a_criterion_is_shown_every_kept_token_of_its_row() -> None:
    recorder = Recorder(token=5)
    stopper = CriteriaStopper([recorder], PROMPTS, max_new_tokens=20)
    assert stopper.clip(Emission(0, [1, 2])) == (2, False)
    assert stopper.clip(Emission(1, [3])) == (1, False)
    assert stopper.clip(Emission(0, [5, 6, 7])) == (1, True)
    # with its padding, alone, and nothing behind its end
    assert recorder.ids == [[[0, 7, 8, 1]], [[0, 7, 8, 1, 2]], [[4, 5, 6, 3]], [[0, 7, 8, 1, 2, 5]]]


def test_every_criterion_sees_every_token_even_when_another_ends_the_row() -> None:
    first, second = Recorder(token=5), Recorder()
    stopper = CriteriaStopper([first, EosTokenCriteria([5]), second], PROMPTS, max_new_tokens=20)
    assert stopper.clip(Emission(0, [1, 5])) == (2, True)
    assert len(first.ids) == len(second.ids) == 2


def test_a_criterion_gets_the_scores_of_its_row_so_far() -> None:
    recorder = Recorder()
    stopper = CriteriaStopper([recorder], PROMPTS, max_new_tokens=20)
    stopper.clip(Emission(0, [1, 2], scores=torch.tensor([[0.1, 0.2], [0.3, 0.4]])))
    stopper.clip(Emission(1, [1]))
    first, second, without = recorder.scores
    assert [s.tolist() for s in first] == [[pytest.approx([0.1, 0.2])]]
    assert [s.tolist() for s in second] == [[pytest.approx([0.1, 0.2])], [pytest.approx([0.3, 0.4])]]
    assert without is None


def test_the_callers_prompts_are_not_written_to() -> None:
    prompts = PROMPTS.clone()
    CriteriaStopper([Recorder()], prompts, max_new_tokens=2).clip(Emission(0, [1, 2]))
    TogetherStopper([Recorder()], prompts, max_new_tokens=2).observe([Emission(0, [1]), Emission(1, [1])])
    assert torch.equal(prompts, PROMPTS)


def test_time_ends_a_row() -> None:
    stopper = CriteriaStopper([MaxTimeCriteria(0.0)], PROMPTS, max_new_tokens=20)
    assert stopper.clip(Emission(0, [1, 2])) == (1, True)


def test_which_criteria_look_at_one_row_at_a_time() -> None:
    known = [MaxLengthCriteria(7), EosTokenCriteria([2]), MaxTimeCriteria(1.0)]
    assert CriteriaStopper.is_rowwise(known)
    assert CriteriaStopper.is_rowwise([])
    assert not CriteriaStopper.is_rowwise([*known, Recorder()])


def together(stopper: TogetherStopper, *tokens: int) -> list[bool]:
    emissions = [Emission(row, [token]) for row, token in enumerate(tokens)]
    stopper.observe(emissions)
    verdicts = [stopper.clip(e) for e in emissions]
    assert {count for count, _ in verdicts} == {1}
    return [finished for _, finished in verdicts]


def test_together_the_batch_is_shown_once_a_step() -> None:
    recorder = Recorder(token=5)
    stopper = TogetherStopper([recorder], PROMPTS, max_new_tokens=20)
    assert together(stopper, 1, 5) == [False, True]
    # a row that has ended stays ended
    assert together(stopper, 2, 3) == [False, True]
    assert together(stopper, 5, 3) == [True, True]
    assert recorder.ids[0] == [[0, 7, 8, 1], [4, 5, 6, 5]]
    assert recorder.ids[2] == [[0, 7, 8, 1, 2, 5], [4, 5, 6, 5, 3, 3]]


def test_together_any_criterion_ends_a_row_and_length_ends_all() -> None:
    stopper = TogetherStopper([Recorder(token=5), EosTokenCriteria([2])], PROMPTS, max_new_tokens=3)
    assert together(stopper, 1, 1) == [False, False]
    assert together(stopper, 2, 1) == [True, False]
    assert together(stopper, 1, 1) == [True, True]
