"""Calibration: AUP by its formula and as an integral, the choice within a budget, and the sweep on a trained toy."""

from __future__ import annotations

import math

import pytest

from accel.distill.prompts import Encoded, Prompt
from accel.errors import OptionError
from accel.methods.dparallel.distill.calibrate import (
    Point,
    aup,
    aup_of,
    check_length,
    check_thresholds,
    choose,
    known_answers,
    require_answers,
    sweep,
)
from accel.models.diffusion import Denoiser, DiffusionFacts


def point(threshold, accuracy, rate):
    return Point(threshold, accuracy, rate, 10 / rate, 10.0)


def test_aup_by_hand():
    def w(y):
        return math.exp(-3 * (1 - y / 80))

    # the point at 70 has lost more than five points and counts nothing
    found = aup([4.0, 1.0, 2.0, 6.0], [78.0, 79.0, 80.0, 70.0], best=80.0)
    expected = 1 * 79 + 0.5 * 1 * (80 * w(80) + 79 * w(79)) + 0.5 * 2 * (78 * w(78) + 80 * w(80))
    assert found == pytest.approx(expected)


def test_aup_without_loss_is_the_rate_times_the_accuracy():
    assert aup([1.0, 3.0, 7.5], [60.0] * 3, best=60.0) == pytest.approx(7.5 * 60)
    # better than the reference is no better than as good: the weight ends at 1
    assert aup([1.0, 2.0], [60.0, 60.0], best=50.0) == pytest.approx(2 * 60)
    assert aup([2.0], [60.0], best=60.0) == pytest.approx(120) and aup([], [], 60.0) == 0 == aup([1.0], [0.0], 0.0)
    same = [point(-1, 60.0, 1.0), point(0.5, 60.0, 2.0)]
    assert aup_of(same) == pytest.approx(120)
    # against a better model's best they count for less, but for the first
    assert aup_of(same, 80.0) == pytest.approx(60 + 60 * math.exp(-0.75), abs=1e-3)


def test_the_choice_is_the_fastest_within_the_budget():
    one = point(-1, 80.0, 1.0)
    points = [point(0.1, 80.0, 2.0), point(0.2, 79.0, 3.0), point(0.3, 78.9, 4.0), point(0.4, 79.5, 3.5)]
    assert choose(one, points, 1.0) is points[3]
    assert choose(one, points[:3], 1.0) is points[1] and choose(one, points, 0.0) is points[0]
    assert choose(one, points, 2.0) is points[2]
    assert choose(one, points[2:3], 1.0) is None
    # of equals the careful one
    same = [point(0.1, 80.0, 3.0), point(0.2, 80.0, 3.0)]
    assert choose(one, same, 1.0) is same[0]


def test_thresholds_are_tried_from_the_careful_end():
    assert check_thresholds([0.5, 0.1, 0.5], "entropy") == [0.1, 0.5]
    assert check_thresholds([0.5, 0.9], "confidence") == [0.9, 0.5]
    for wrong in (math.nan, math.inf, True, "0.1"):
        with pytest.raises(OptionError, match="is no finite number"):
            check_thresholds([wrong], "entropy")


def test_answers_are_found_by_their_prompts():
    prompts = [Prompt(text="a", answer="1"), Prompt(text="b"), Prompt(text="c", answer="3")]
    asked = Encoded([[1], [2]], [None, None], [prompts[2].digest(), prompts[1].digest()])
    known = known_answers(prompts, asked)
    assert known == ["3", None]
    with pytest.raises(OptionError, match="1 of 2 prompts have no answer to compare with: add answers"):
        require_answers(known, "")


def test_the_sweep_measures_forwards_and_accuracy(tiny, bytewise):
    """No answer is right here: what counts is one token a forward at one end and one forward a block at the other."""
    model = tiny.build("llama", vocab_size=len(bytewise) + 1)
    facts = DiffusionFacts(mask_token=len(bytewise), block_length=4, stop_tokens=(0,))
    denoiser = Denoiser(model, facts)
    prompts = [[5, 9, 11], [7, 100], [12, 30, 31, 40]]
    how = {"max_new_tokens": 8, "rows": 2, "thresholds": [1e3, -1.0], "budget": 1.0}
    blind = sweep(denoiser, bytewise, prompts, ["0"] * 3, **how)
    assert blind.one.forwards == blind.points[0].forwards and blind.one.tokens_per_forward == 1
    assert [each.threshold for each in blind.points] == [-1, 1e3]
    last = blind.points[-1]
    assert last.forwards == pytest.approx(last.tokens / 4, abs=1) and last.tokens_per_forward > 2
    assert last.accuracy == 0 and blind.chosen is last and blind.prompts == 3
    # what is known already is not measured again
    known = point(-1.0, 50.0, 1.0)
    again = sweep(denoiser, bytewise, prompts, ["0"] * 3, one=known, **how)
    assert again.one is known and again.points == blind.points and again.chosen is None
    document = blind.as_dict()
    assert document["points"][1]["threshold"] == 1e3 and document["chosen"]["threshold"] == 1e3
    with pytest.raises(OptionError, match="budget=-1"):
        sweep(denoiser, bytewise, prompts, ["0"] * 3, budget=-1)


def test_a_rule_that_counts_has_no_threshold(tiny, bytewise):
    model = tiny.build("llama", vocab_size=len(bytewise) + 1)
    denoiser = Denoiser(model, DiffusionFacts(mask_token=len(bytewise), rule="top_k", stop_tokens=(0,)))
    with pytest.raises(OptionError, match="'top_k' has no threshold: give its facts one of entropy, confidence"):
        sweep(denoiser, bytewise, [[5]], ["0"])


def test_what_does_not_fit_is_refused():
    check_length(64, 32, 32, 1)
    check_length(None, 32, 10**6, 10**6)
    with pytest.raises(OptionError, match="behind a prompt of 33 tokens that is 65 positions, the model has 64"):
        check_length(64, 32, 33, 1)
