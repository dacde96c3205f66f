"""Options and facts become a plan; whatever contradicts is one line."""

from __future__ import annotations

import math

import pytest
import toy_denoiser

from accel.errors import OptionError
from accel.methods.dparallel.options import DParallelOptions, Plan


@pytest.fixture
def toys():
    return toy_denoiser


WRONG = {
    "rule": ({"rule": "entrpy"}, "top_k_entropy"),
    "cache": ({"cache": "double"}, "prefix"),
    "block of nothing": ({"block_length": 0}, "≥ 1"),
    "block as a word": ({"block_length": "32"}, "≥ 1"),
    "no steps": ({"rule": "top_k", "steps": 0}, "≥ 1"),
    "steps that are a truth value": ({"rule": "top_k", "steps": True}, "≥ 1"),
    "threshold as a word": ({"threshold": "high"}, "nats"),
    "threshold that is no number": ({"threshold": math.nan}, "nats"),
    "strict": ({"strict": "yes"}, "True or False"),
    "early stop": ({"early_stop": None}, "True or False"),
}
CONTRADICTIONS = {
    "a probability from nats": ({"rule": "confidence"}, {}, "0.9"),
    "nats from a probability": ({"rule": "entropy"}, {"rule": "confidence", "threshold": 0.9}, "nats"),
    "a threshold from a count": ({"rule": "entropy"}, {"rule": "top_k"}, "nats"),
    "a threshold for a count": ({"rule": "top_k", "threshold": 0.5}, {}, "steps="),
    "a threshold for the model's count": ({"threshold": 0.5}, {"rule": "top_k"}, "steps="),
    "steps for a threshold": ({"steps": 4}, {}, "threshold="),
}


def refusal(call) -> str:
    with pytest.raises(OptionError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case) -> None:
    options, hint = WRONG[case]
    assert hint in refusal(lambda: DParallelOptions(**options))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_does_not_go_with_the_model(toys, case) -> None:
    options, facts, hint = CONTRADICTIONS[case]
    assert hint in refusal(lambda: DParallelOptions(**options).plan(toys.facts(**facts)))


def test_what_is_left_out_comes_from_the_facts(toys) -> None:
    facts = toys.facts(threshold=0.45, strict=True, block_length=16)
    assert DParallelOptions().plan(facts) == Plan("entropy", 0.45, True, 16, None)
    chosen = DParallelOptions(rule="confidence", threshold=0, strict=False, block_length=8)
    assert chosen.plan(facts) == Plan("confidence", 0, False, 8, None)
    assert DParallelOptions(rule="top_k", steps=2).plan(facts) == Plan("top_k", None, True, 16, 2)
    assert DParallelOptions().plan(toys.facts(rule="top_k")).threshold is None


@pytest.mark.parametrize("masks", [1, 5, 32])
@pytest.mark.parametrize("steps", [None, 1, 3, 32, 50])
def test_counts_add_up_and_none_is_empty(masks, steps) -> None:
    counts = Plan("top_k", None, False, 32, steps).counts(masks)
    assert sum(counts) == masks and min(counts) >= 1 and counts == sorted(counts, reverse=True)
    assert len(counts) == min(masks, steps or masks) and max(counts) - min(counts) <= 1
