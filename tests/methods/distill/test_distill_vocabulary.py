"""Which tokens a trimmed vocabulary keeps, and how much of a text they cover."""

from __future__ import annotations

import pytest
import torch

from accel.errors import OptionError
from accel.methods.speculative.distill.vocabulary import count, coverage, trim

#                id:  0  1  2  3  4  5  6  7
COUNTS = torch.tensor([0, 7, 3, 9, 3, 3, 1, 0])


def test_counting_takes_lists_and_tensors_of_any_kind():
    found = count([[1, 1, 4], torch.tensor([4, 0], dtype=torch.int32), [], torch.tensor([[2], [1]])], 6)
    assert found.tolist() == [1, 3, 1, 0, 2, 0]
    assert found.dtype == torch.int64


@pytest.mark.parametrize("wrong", [6, -1])
def test_counting_names_a_token_that_does_not_exist(wrong):
    with pytest.raises(OptionError, match=f"token {wrong}: .* 0 to 5"):
        count([[1, wrong]], 6)


def test_the_most_frequent_are_kept_in_ascending_order_and_ties_go_to_the_lower_id():
    found = trim(COUNTS, 4)
    assert found.d2t.tolist() == [1, 2, 3, 4]
    assert found.target_vocab_size == 8
    assert trim(torch.arange(5000) % 2, 1500).d2t.tolist() == list(range(1, 3000, 2))


def test_what_must_be_kept_comes_first_and_once():
    assert trim(COUNTS, 4, [7, 0, 3]).d2t.tolist() == [0, 1, 3, 7]
    assert trim(COUNTS, 2, [7, 0, 7]).d2t.tolist() == [0, 7]


def test_the_least_used_kept_token_stands_for_all_others():
    found = trim(COUNTS, 4, [0])
    assert found.d2t.tolist()[found.unknown] == 0
    assert found.t2d().tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    without = trim(COUNTS, 2)
    assert without.d2t.tolist()[without.unknown] == 1


def test_keeping_all_is_the_identity():
    found = trim(COUNTS, 8)
    assert found.t2d().tolist() == list(range(8))
    assert coverage(COUNTS, found) == 1


def test_coverage_is_a_share_of_tokens_and_not_of_ids():
    assert coverage(COUNTS, trim(COUNTS, 2)) == pytest.approx(16 / 26)
    assert coverage(COUNTS, trim(COUNTS, 2, [0, 7])) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: trim(COUNTS, 9), "vocabulary of 9: the target has 8"),
        (lambda: trim(COUNTS, 0), "keep 1 to 8"),
        (lambda: trim(COUNTS, 2, [1, 2, 3]), "3 tokens must always be kept"),
        (lambda: trim(COUNTS, 4, [8]), "token 8"),
        (lambda: coverage(torch.zeros(8, dtype=torch.long), trim(COUNTS, 2)), "no tokens"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(OptionError, match=says):
        call()
