"""The losses by brute force in double precision, by finite differences, and by enumerating every mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from accel.methods.dparallel.distill.losses import certainty_forcing, cross_entropy, entropy, without

MASK = 4


def logits_of(rows, vocab=5, seed=0, scale=2.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def by_hand(logits, labels, weight, tokens, beta, temperature):
    """The equation, one token at a time, with the mask token left out of every sum."""
    total, entropies = 0.0, []
    for row, label, w in zip(logits.tolist(), labels.tolist(), weight.tolist(), strict=True):
        allowed = [(i, z) for i, z in enumerate(row) if i != MASK]
        norm = sum(math.exp(z) for _, z in allowed)
        total += -w * math.log(math.exp(row[label]) / norm) / tokens
        if max(allowed, key=lambda pair: pair[1])[0] == label:
            sharp = [math.exp(z / temperature) for _, z in allowed]
            p = [z / sum(sharp) for z in sharp]
            entropies.append(-sum(x * math.log(x) for x in p))
    return total + beta * (sum(entropies) / len(entropies) if entropies else 0.0)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_loss_by_hand(beta, temperature):
    logits, weight = logits_of(12), torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.5
    logits[3, MASK] = 50.0  # a model that is sure of the mask token is not right about anything
    labels = logits[:, :MASK].argmax(-1)
    labels[::3] = (labels[::3] + 1) % MASK
    how = {"beta": beta, "temperature": temperature}
    found = certainty_forcing(logits, labels, weight, 9, mask_token=MASK, **how)
    assert float(found.loss) == pytest.approx(by_hand(logits, labels, weight, 9, **how), rel=1e-5)
    assert found.correct == pytest.approx(8 / 12)
    alone = certainty_forcing(logits, labels, weight, 9, mask_token=MASK, beta=0.0, temperature=temperature)
    assert found.entropy == pytest.approx(alone.entropy)
    assert float(found.loss - alone.loss) == pytest.approx(beta * found.entropy, rel=1e-5, abs=1e-7)


def test_certainty_alone_reaches_right_tokens_alone():
    logits = logits_of(6, seed=3).requires_grad_()
    labels = logits[:, :MASK].argmax(-1).detach()
    labels[:3] = (labels[:3] + 1) % MASK
    args = (labels, torch.zeros(6), 6)
    certainty_forcing(logits, *args, mask_token=MASK, beta=1.0).loss.backward()
    assert not logits.grad[:3].any() and logits.grad[3:].abs().sum(-1).min() > 1e-4
    # down the gradient the entropy falls, and the right token stays the most likely one
    lower = (logits - 0.1 * logits.grad).detach()
    before, after = (entropy(without(each, MASK), 0.5)[3:] for each in (logits, lower))
    assert (after < before).all() and torch.equal(lower[3:, :MASK].argmax(-1), labels[3:])


def test_gradients_are_finite_differences():
    logits = logits_of(4, seed=5)
    labels = logits[:, :MASK].argmax(-1)
    labels[0] = (labels[0] + 1) % MASK
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])

    def value(at):
        return certainty_forcing(at, labels, weight, 3, mask_token=MASK, beta=2.0).loss

    leaf = logits.clone().requires_grad_()
    value(leaf).backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[:, MASK].any()
    step = 1e-2
    for row, column in itertools.product(range(4), range(5)):
        nudge = torch.zeros_like(logits)
        nudge[row, column] = step
        slope = float(value(logits + nudge) - value(logits - nudge)) / (2 * step)
        assert float(leaf.grad[row, column]) == pytest.approx(slope, abs=2e-3)


def test_saturated_logits_stay_finite():
    logits = torch.tensor([[1000.0, -1000.0, 0.0, 0.0, 2000.0]], requires_grad=True)
    found = certainty_forcing(logits, torch.tensor([0]), torch.ones(1), 1, mask_token=MASK, beta=2.0)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(0, abs=1e-6) and torch.isfinite(logits.grad).all()


def test_no_learned_token_is_no_loss_and_has_a_gradient_of_zero():
    """A view of "diffusion" may hide nothing."""
    weight = torch.ones(3, 5, requires_grad=True)
    logits = torch.zeros(0, 3) @ weight
    nothing = torch.zeros(0)
    found = certainty_forcing(logits, nothing.long(), nothing, 8, mask_token=MASK, beta=1.0)
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("time", [0.3, 1.0])
def test_the_weight_of_diffusion_makes_it_unbiased(time):
    """Over all masks of four positions, by their probability: the mean is the mean cross entropy."""
    logits, labels = logits_of(4, seed=7), torch.tensor([0, 1, 2, 3])
    mean = 0.0
    for mask in itertools.product([False, True], repeat=4):
        chance = math.prod(time if hidden else 1 - time for hidden in mask)
        chosen = torch.tensor(mask).nonzero()[:, 0]
        weight = torch.full((len(chosen),), 1 / time)
        some = certainty_forcing(logits[chosen], labels[chosen], weight, 4, mask_token=MASK, beta=0.0)
        mean += chance * float(some.loss)
    assert mean == pytest.approx(float(cross_entropy(without(logits, MASK), labels).mean()), rel=1e-5)
