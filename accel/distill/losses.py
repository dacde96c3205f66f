"""How far a draft is from its target, position by position: the divergences of DistillSpec and the acceptance losses.

Knows distributions. Does not know models, data or optimisers.

A target's distribution is given as its k most likely tokens and the mass of all others, because that is what a cache
of teacher outputs can hold. All tokens outside the listed ones are one event, "the rest", for target and draft alike:
a divergence over fewer events is never larger than the true one (data processing), and it is the true one where k
covers the vocabulary. Target tokens that the draft has no id for belong to the rest too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from accel.errors import OptionError, unknown_name

# A mass this small cannot be told from rounding: log-probabilities are stored in half precision. A target's rest below
# it is none, and an event that only one of the two deems possible counts as this likely for the other, so that a
# divergence stays finite.
TINY = 1e-6
# λ = exp(−η α) of the LK hybrid
ETA = 3.0


class Teacher(NamedTuple):
    """The target at N positions: ``ids`` int64 [N, k] in the draft's vocabulary, -1 where it has none; ``logp`` [N, k].

    ``logp`` are log-probabilities of the whole target distribution: what they leave to 1 is the mass of the rest.
    """

    ids: Tensor
    logp: Tensor


class Pair(NamedTuple):
    """The same events seen by both: ``log_p`` (target) and ``log_q`` (draft), [N, k+1]; the last event is the rest.

    Events that do not exist (a listed token the draft has no id for) have log-probability -inf in both.
    """

    log_p: Tensor
    log_q: Tensor


def pair(logits: Tensor, teacher: Teacher) -> Pair:
    """Bring draft logits [N, V] and the teacher's list to common events, in the logits' precision, fp32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    vocab = logits.shape[-1]
    known = teacher.ids >= 0
    # column V takes what the draft has no id for
    listed = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    listed = listed.scatter_(-1, teacher.ids.where(known, vocab), True)[:, :vocab]
    whole = listed.all(-1, keepdim=True)  # no token is left for the draft's rest

    total = logits.logsumexp(-1, keepdim=True)
    log_q = (logits.gather(-1, teacher.ids.clamp(min=0)) - total).masked_fill(~known, -torch.inf)
    # 1 − Σ q would lose the rest of a confident draft
    outside = logits.masked_fill(listed, -torch.inf).logsumexp(-1, keepdim=True)
    rest_q = (outside - total).masked_fill(whole, -torch.inf)

    log_p = teacher.logp.to(logits.dtype).masked_fill(~known, -torch.inf)
    mass = log_p.logsumexp(-1, keepdim=True)
    complete = whole & known.all(-1, keepdim=True)
    # half precision may sum to a little more than 1; a list of all there is sums to 1 exactly
    excess = torch.where(complete, mass, mass.clamp(min=0))
    log_p = log_p - excess
    rest_p = _log_complement(mass).masked_fill(complete, -torch.inf)
    return Pair(torch.cat([log_p, rest_p], -1), torch.cat([log_q, rest_q], -1))


def sharpen(teacher: Teacher, temperature: float) -> Teacher:
    """The teacher at another temperature: p^(1/T), renormalised over the list and the rest.

    The rest is taken for one token. That is exact for a list of the whole vocabulary; for a shorter one it overstates
    the rest where T < 1 and understates it where T > 1, because (Σ p)^(1/T) is not Σ p^(1/T). Sharpen the draft's
    logits by the same temperature.
    """
    if not 0 < temperature < math.inf:
        raise OptionError(f"temperature={temperature}: must be a positive number; 1 is the target's own")
    if temperature == 1:
        return teacher
    logp = teacher.logp if teacher.logp.dtype == torch.float64 else teacher.logp.float()
    rest = _log_complement(logp.logsumexp(-1, keepdim=True))
    scaled = torch.cat([logp, rest], -1) / temperature
    return Teacher(teacher.ids, scaled.log_softmax(-1)[..., :-1])


def acceptance(events: Pair) -> Tensor:
    """α = Σ min(p, q) = 1 − TVD(p, q): the chance that a token sampled from the draft is kept; [N, k+1] → [N]."""
    return torch.minimum(events.log_p, events.log_q).exp().sum(-1)


def forward_kl(events: Pair) -> Tensor:
    """KL(p ‖ q) = Σ p ln(p / q), [N]: makes the draft cover what the target may say."""
    return _kl(events.log_p, events.log_q)


def reverse_kl(events: Pair) -> Tensor:
    """KL(q ‖ p), [N]: keeps the draft from saying what the target would not."""
    return _kl(events.log_q, events.log_p)


def jsd(events: Pair, beta: float) -> Tensor:
    """JSD[β] = β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, [N] (Agarwal et al. 2024, GKD)."""
    if not 0 < beta < 1:
        raise OptionError(f"beta={beta}: JSD needs 0 < β < 1; use 'fkl' or 'rkl' for the ends")
    # logaddexp has no gradient where both are -inf: such events do not exist and count nothing below
    neither = (events.log_p == -torch.inf) & (events.log_q == -torch.inf)
    log_p, log_q = (each.masked_fill(neither, 0.0) for each in events)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(events.log_p, log_m) + (1 - beta) * _kl(events.log_q, log_m)


def tvd(events: Pair) -> Tensor:
    """TVD = ½ Σ |p − q|, [N]."""
    return 0.5 * (events.log_p.exp() - events.log_q.exp()).abs().sum(-1)


def nla(events: Pair) -> Tensor:
    """−ln α, [N]: the acceptance loss whose gradient does not fade where α is small (LK losses, arXiv 2602.23881)."""
    return -torch.minimum(events.log_p, events.log_q).logsumexp(-1)


def lk_hybrid(events: Pair) -> Tensor:
    """λ KL(p ‖ q) + (1 − λ) TVD with λ = exp(−η α), η = 3, [N] (LK losses, arXiv 2602.23881).

    KL leads while few tokens are accepted, TVD once many are. λ is a weight and takes no gradient.
    """
    weight = (-ETA * acceptance(events).detach()).exp()
    return weight * forward_kl(events) + (1 - weight) * tvd(events)


_BY_NAME: Mapping[str, Callable[[Pair], Tensor]] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "tvd": tvd,
    "nla": nla,
    "lk": lk_hybrid,
}
LOSSES = ("fkl", "rkl", "jsd", "tvd", "nla", "lk")


def loss(name: str, events: Pair, *, beta: float = 0.5) -> Tensor:
    """The loss ``name`` at each position, [N, k+1] → [N]; ``beta`` is JSD's."""
    if name == "jsd":
        return jsd(events, beta)
    if name not in _BY_NAME:
        raise OptionError(unknown_name("loss", name, LOSSES))
    return _BY_NAME[name](events)


def unlisted(logits: Tensor, teacher: Teacher, answer: Tensor) -> Tensor:
    """−ln q(answer | not listed) where the answer is none of the listed tokens and the draft can say it, else 0; [N].

    logits [N, V], answer int64 [N], -1 where the draft cannot say it. For answers drawn from the target its
    expectation is the rest's share of the cross entropy, −Σ p ln q(· | rest) over the tokens that are not listed:
    with it the forward KL over events becomes the one over all tokens, up to a constant. Without it a draft spreads
    its rest as it likes, and what it draws there is refused.
    """
    known = teacher.ids >= 0
    outside = (answer >= 0) & ~((teacher.ids == answer[:, None]) & known).any(-1)
    found = logits.new_zeros(len(logits), dtype=torch.float32)
    rows = outside.nonzero()[:, 0]
    if len(rows) == 0:
        return found
    # a column more, for listed tokens that the draft has no id for
    some = logits[rows].float()
    listed = torch.zeros(len(rows), some.shape[-1] + 1, dtype=torch.bool, device=some.device)
    listed = listed.scatter_(-1, teacher.ids[rows].where(known[rows], some.shape[-1]), True)[:, :-1]
    log_q = some.masked_fill(listed, -torch.inf).log_softmax(-1)
    return found.index_put((rows,), -log_q[torch.arange(len(rows), device=rows.device), answer[rows]])


def select(student_loss: Tensor, reference_loss: Tensor, keep: float) -> Tensor:
    """The share ``keep`` of tokens where the student loses most to a distilled reference; two [N] → bool [N].

    AdaSPEC (Hu et al. 2025): such tokens can still be learned; where the reference fails too, capacity is wasted.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep={keep}: must be a share of the tokens in (0, 1]; 1 keeps all")
    gap = (student_loss - reference_loss).detach()
    chosen = torch.zeros_like(gap, dtype=torch.bool)
    chosen[gap.argsort(descending=True, stable=True)[: math.ceil(keep * len(gap))]] = True
    return chosen


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a ln(a / b), [N, E] → [N]; see ``TINY`` for events that are impossible under b alone."""
    log_b = log_b.masked_fill(log_b == -torch.inf, math.log(TINY))
    # 0 ln 0 = 0, in the gradient too
    ratio = log_a.masked_fill(log_a == -torch.inf, 0.0) - log_b
    return (log_a.exp() * ratio).sum(-1)


def _log_complement(log_mass: Tensor) -> Tensor:
    """ln(1 − mass), -inf where that is no more than rounding."""
    rest = -torch.expm1(log_mass)
    return rest.log().masked_fill(rest <= TINY, -torch.inf)
