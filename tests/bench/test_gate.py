"""The gate: equal outputs pass, ties pass with their margin, wrong outputs do not."""

from __future__ import annotations

import pytest
import torch

from accel.bench import gate


@pytest.fixture
def prompt():
    return torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def reference(model, prompt):
    output = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[0, 4:].tolist()


def test_equal_outputs_are_identical(model, prompt, reference):
    assert gate.compare(model, prompt, reference, list(reference)) == gate.Verdict(gate.IDENTICAL)


def test_another_token_fails_and_says_where_and_by_how_much(model, prompt, reference):
    with torch.no_grad():
        logits = model(torch.tensor([prompt[0].tolist() + reference[:2]])).logits[0, -1]
    wrong = int(logits.argmin())
    verdict = gate.compare(model, prompt, reference, [*reference[:2], wrong, *reference[3:]])
    assert verdict.name == gate.FAILED
    assert verdict.margin == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert f"token 2 is {wrong} and the reference has {reference[2]}" in verdict.reason


def test_a_tie_is_similar_whatever_follows(model, prompt, reference):
    twin = next(i for i in range(10, 200) if i not in reference)
    head = model.lm_head.weight
    before = head[twin].clone()
    try:
        with torch.no_grad():
            head[twin] = head[reference[1]] * (1 + 1e-6)
        verdict = gate.compare(model, prompt, reference, [reference[0], twin, 1, 2])
    finally:
        with torch.no_grad():
            head[twin] = before
    assert verdict.name == gate.SIMILAR
    assert 0 <= verdict.margin <= gate.ABSOLUTE_TOLERANCE
    # without the twin's weights the same output is wrong
    assert gate.compare(model, prompt, reference, [reference[0], twin, 1, 2]).name == gate.FAILED


@pytest.mark.parametrize("change", [lambda out: out[:3], lambda out: [*out, 1], lambda out: []])
def test_ending_elsewhere_fails(model, prompt, reference, change):
    verdict = gate.compare(model, prompt, reference, change(reference))
    assert verdict.name == gate.FAILED
    assert "where the reference has 6" in verdict.reason


def test_tolerance_grows_with_coarse_types_only():
    logits = torch.tensor([20.0, -3.0])
    assert gate.tolerance(logits, torch.float32) == gate.ABSOLUTE_TOLERANCE
    assert gate.tolerance(logits, torch.bfloat16) == pytest.approx(2 * 2**-7 * 20)
