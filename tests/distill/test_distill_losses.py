"""Every loss against the definition, computed over the whole vocabulary in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from accel.distill.losses import (
    LOSSES,
    Pair,
    Teacher,
    acceptance,
    loss,
    pair,
    select,
    sharpen,
    unlisted,
)
from accel.errors import OptionError

V, N = 11, 6
# losses over fewer events are never larger (data processing); the hybrid's weight moves, so it promises nothing
BOUNDED = [name for name in LOSSES if name != "lk"]


def by_definition(name: str, p: torch.Tensor, q: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """p, q fp64 [N, V], all above 0 → [N]."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    alpha = torch.minimum(p, q).sum(-1)
    mixed = beta * p + (1 - beta) * q
    weight = torch.exp(-3 * alpha)
    return {
        "fkl": kl(p, q),
        "rkl": kl(q, p),
        "jsd": beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
        "tvd": 1 - alpha,
        "nla": -alpha.log(),
        "lk": weight * kl(p, q) + (1 - weight) * (1 - alpha),
    }[name]


def example(k: int = V, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Teacher]:
    """Draft logits fp64 [N, V], the target's whole log p, and its k most likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_p = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64)).log_softmax(-1)
    logp, ids = log_p.topk(k, -1)
    return logits, log_p, Teacher(ids, logp)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_list_gives_the_definition(name, beta):
    logits, log_p, teacher = example()
    found = loss(name, pair(logits, teacher), beta=beta)
    torch.testing.assert_close(found, by_definition(name, log_p.exp(), logits.softmax(-1), beta))


@pytest.mark.parametrize("name", LOSSES)
def test_a_short_list_gives_the_definition_over_its_events(name):
    logits, _, teacher = example(k=4)
    q = logits.softmax(-1)
    p_events = torch.cat([teacher.logp.exp(), 1 - teacher.logp.exp().sum(-1, keepdim=True)], -1)
    listed = q.gather(-1, teacher.ids)
    q_events = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(loss(name, pair(logits, teacher)), by_definition(name, p_events, q_events))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_shorter_list_never_gives_more(name):
    whole = by_definition(name, *(each.exp() for each in (example()[1], example()[0].log_softmax(-1))))
    last = torch.zeros(N, dtype=torch.float64)
    for k in range(1, V):
        logits, _, teacher = example(k=k)
        found = loss(name, pair(logits, teacher))
        assert (found >= last - 1e-9).all()
        last = found
    assert (last <= whole + 1e-9).all()


@pytest.mark.parametrize("k", [1, 4, V])
def test_acceptance_is_what_the_distance_leaves(k):
    logits, _, teacher = example(k=k)
    events = pair(logits, teacher)
    torch.testing.assert_close(acceptance(events), 1 - loss("tvd", events))


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("name", LOSSES)
def test_a_draft_that_is_the_target_loses_nothing(name, k):
    _, log_p, teacher = example(k=k)
    found = loss(name, pair(3 + log_p.float(), Teacher(teacher.ids, teacher.logp.float())))
    torch.testing.assert_close(found, torch.zeros(N), atol=2e-6, rtol=0)


def test_a_draft_that_says_what_the_target_never_does():
    logits = torch.full((1, V), -60.0, dtype=torch.float64)
    logits[0, 3] = 60.0
    events = pair(logits, Teacher(torch.tensor([[5]]), torch.zeros(1, 1, dtype=torch.float64)))
    assert loss("tvd", events).item() == pytest.approx(1)
    assert loss("fkl", events).item() == pytest.approx(120)
    assert loss("nla", events).item() == pytest.approx(120)
    assert loss("jsd", events).item() == pytest.approx(math.log(2))
    assert loss("rkl", events).item() == pytest.approx(-math.log(1e-6), rel=1e-3)
    assert loss("lk", events).item() == pytest.approx(120)


def test_a_single_certain_token_makes_next_token_loss():
    logits = example()[0].float().requires_grad_()
    answer = torch.arange(N)
    ours = loss("fkl", pair(logits, Teacher(answer[:, None], torch.zeros(N, 1))))
    theirs = torch.nn.functional.cross_entropy(logits, answer, reduction="none")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (ours, theirs)))


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_that_the_draft_has_no_id_for_belong_to_the_rest(name):
    logits, _, teacher = example(k=4)
    known = teacher.ids != teacher.ids[:, 1:2]
    found = loss(name, pair(logits, Teacher(teacher.ids.where(known, -1), teacher.logp)))
    shorter = Teacher(*(each[known].view(N, 3) for each in teacher))
    torch.testing.assert_close(found, loss(name, pair(logits, shorter)))


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, k):
    logits, _, teacher = example(k=k)
    ids = teacher.ids.clone()
    ids[0, 0] = -1

    def value(x):
        found = loss(name, pair(x, Teacher(ids, teacher.logp)))
        # λ is a weight: numerical differences would see it move
        if name == "lk":
            alpha = acceptance(pair(logits, Teacher(ids, teacher.logp)))
            weight = torch.exp(-3 * alpha)
            events = pair(x, Teacher(ids, teacher.logp))
            return weight * loss("fkl", events) + (1 - weight) * loss("tvd", events)
        return found

    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x,))
    by_loss = torch.autograd.grad(loss(name, pair(x, Teacher(ids, teacher.logp))).sum(), x)[0]
    torch.testing.assert_close(by_loss, torch.autograd.grad(value(x).sum(), x)[0])
    assert by_loss.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("name", LOSSES)
def test_saturated_logits_and_half_precision_lists_stay_finite(name, k, scale):
    logits = scale * example()[0].float()
    _, _, teacher = example(k=k, seed=1)
    # the last position's list sums to more than 1, as rounded ones do
    logp = (teacher.logp / torch.linspace(0.05, 1, N, dtype=torch.float64)[:, None]).log_softmax(-1).half()
    logp[-1] += 1e-3
    ids = teacher.ids.clone()
    ids[0] = -1
    ids[1, -1] = -1
    x = logits.requires_grad_()
    found = loss(name, pair(x, Teacher(ids, logp)))
    assert found.isfinite().all() and (found >= -1e-5).all()
    found.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_events_that_do_not_exist_have_no_gradient_and_no_nan(name):
    log_q = torch.tensor([[math.log(0.7), -torch.inf, math.log(0.3), -torch.inf]]).requires_grad_()
    log_p = torch.tensor([[math.log(0.2), -torch.inf, math.log(0.8), -torch.inf]])
    found = loss(name, Pair(log_p, log_q))
    torch.testing.assert_close(found, loss(name, Pair(log_p[:, [0, 2]], log_q[:, [0, 2]])))
    found.sum().backward()
    assert log_q.grad.isfinite().all() and (log_q.grad[0, [1, 3]] == 0).all() and log_q.grad[0, 2] != 0


@pytest.mark.parametrize("off", [-2e-3, 2e-3])
def test_a_rounded_list_of_everything_has_no_rest(off):
    logits, log_p, teacher = example()
    events = pair(logits, Teacher(teacher.ids, teacher.logp + off))
    assert (events.log_p[:, -1] == -torch.inf).all() and (events.log_q[:, -1] == -torch.inf).all()
    torch.testing.assert_close(events.log_p[:, :-1], log_p.gather(-1, teacher.ids))


def test_a_list_that_rounding_lifted_above_one_is_brought_back():
    logits, _, teacher = example(k=4)
    sure = teacher.logp.log_softmax(-1)
    events = pair(logits, Teacher(teacher.ids, sure + 2e-3))
    torch.testing.assert_close(events.log_p[:, :-1], sure)
    assert (events.log_p[:, -1] == -torch.inf).all() and events.log_q[:, -1].isfinite().all()


def test_a_draft_whose_whole_vocabulary_is_listed_beside_tokens_it_has_no_id_for():
    logits, log_p, teacher = example()
    # the target's ids 0 to 4 are the draft's, the others are not
    ids = teacher.ids.where(teacher.ids < 5, -1)
    x = logits[:, :5].clone().requires_grad_()
    events = pair(x, Teacher(ids, teacher.logp))
    q = torch.cat([x.softmax(-1), torch.zeros(N, V - 5, dtype=x.dtype)], -1)
    torch.testing.assert_close(acceptance(events), torch.minimum(log_p.exp(), q).sum(-1))
    for name in LOSSES:
        found = loss(name, events)
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), x, retain_graph=True)[0].isfinite().all()


def test_the_rest_of_a_sure_draft_keeps_its_digits():
    logits = torch.zeros(1, V)
    logits[0, 0] = 40.0
    events = pair(logits, Teacher(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])))
    # 1 − q(0) is 0 in fp32
    assert events.log_q[0, -1].item() == pytest.approx(math.log(V - 1) - 40, rel=1e-6)


def test_half_precision_logits_are_read_in_single():
    logits, _, teacher = example(k=4)
    events = pair(logits.bfloat16(), Teacher(teacher.ids, teacher.logp.half()))
    assert events.log_q.dtype == events.log_p.dtype == torch.float32
    torch.testing.assert_close(events.log_q.exp().sum(-1), torch.ones(N))


@pytest.mark.parametrize("k", [1, 4, V])
def test_drawn_answers_tell_what_the_list_does_not_hold(k):
    """In expectation over the target's tokens, events and answers together give the forward KL over all tokens."""
    logits, log_p, teacher = example(k)
    p = log_p.exp()
    expected = sum(p[:, x] * unlisted(logits.float(), teacher, torch.full((N,), x)) for x in range(V))
    rest = torch.ones(N, V, dtype=torch.bool).scatter_(-1, teacher.ids, False)
    # what the target itself would lose there, a constant of training
    inside = log_p.masked_fill(~rest, -torch.inf).log_softmax(-1)
    constant = -(p * inside).masked_fill(~rest, 0.0).sum(-1)
    whole = loss("fkl", pair(logits, teacher)) + expected - constant
    torch.testing.assert_close(whole, by_definition("fkl", p, logits.softmax(-1)), rtol=1e-5, atol=1e-5)


def test_answers_that_are_listed_or_cannot_be_said_add_nothing():
    logits, _, teacher = example(3)
    assert not unlisted(logits, teacher, teacher.ids[:, 1]).any()
    assert not unlisted(logits, teacher, torch.full((N,), -1)).any()
    unsayable = Teacher(teacher.ids.masked_fill(teacher.ids == teacher.ids[:, :1], -1), teacher.logp)
    others = torch.ones(N, V).scatter_(-1, teacher.ids, 0.0).argmax(-1)
    leaf = logits.float().requires_grad_()
    unlisted(leaf, unsayable, others).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad.gather(-1, others[:, None]) < 0).all()
    assert (leaf.grad.gather(-1, teacher.ids[:, 1:]) == 0).all()  # listed tokens are left alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_whole_list_sharpens_exactly(temperature):
    _, log_p, teacher = example()
    expected = (log_p / temperature).log_softmax(-1).gather(-1, teacher.ids)
    torch.testing.assert_close(sharpen(teacher, temperature).logp, expected)


@pytest.mark.parametrize(("temperature", "sign"), [(0.5, 1), (2.0, -1)])
def test_a_short_list_sharpens_its_ratios_and_errs_in_the_rest_as_stated(temperature, sign):
    _, log_p, teacher = example(k=4)
    found = sharpen(teacher, temperature)
    exact = (log_p / temperature).log_softmax(-1).gather(-1, teacher.ids)
    torch.testing.assert_close(found.logp.diff(), exact.diff())
    rest, exact_rest = (1 - each.exp().sum(-1) for each in (found.logp, exact))
    assert (sign * (rest - exact_rest) > 0).all()
    assert torch.equal(found.ids, teacher.ids)


def test_selection_keeps_what_can_still_be_learned():
    student = torch.tensor([5.0, 1.0, 4.0, 2.0, 9.0])
    reference = torch.tensor([1.0, 0.0, 4.0, 0.5, 8.5])
    assert select(student, reference, 0.4).tolist() == [True, False, False, True, False]
    assert select(student, reference, 0.41).sum() == 3
    assert select(student, reference, 1.0).all()
    assert select(student, student, 0.4).tolist() == [True, True, False, False, False]
    assert select(student[:0], reference[:0], 0.4).shape == (0,)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda events, teacher: loss("kl", events), "unknown loss 'kl': choose from fkl"),
        (lambda events, teacher: loss("jsd", events, beta=1.0), "beta=1.0"),
        (lambda events, teacher: sharpen(teacher, 0.0), "temperature=0.0"),
        (lambda events, teacher: select(torch.ones(2), torch.ones(2), 0.0), "keep=0.0"),
    ],
)
def test_refusals(call, says):
    logits, _, teacher = example(k=2)
    with pytest.raises(OptionError, match=says):
        call(pair(logits, teacher), teacher)
