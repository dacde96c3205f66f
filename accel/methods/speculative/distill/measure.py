"""How good a draft is along texts of the target: agreement by position, and the tokens a target call brings.

Teacher-forced: one forward of the draft over each text. Does not know clocks; costs are measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.distill.batches import Batch
from accel.distill.forward import Scorer
from accel.distill.losses import Teacher, acceptance, pair
from accel.errors import OptionError

GAMMAS = (1, 3, 5, 7)


@dataclass(frozen=True)
class Measures:
    """Averages over the positions of held-out answers.

    ``acceptance``: α = 1 − TVD(p, q) at temperature 1, the chance that a drafted token is kept (Leviathan et al. 2023,
    corollary 3.6). ``top1``: the share of positions where both put the same token first. ``block_efficiency``: γ → τ,
    the tokens a target call brings where γ are drafted.
    """

    positions: int
    acceptance: float
    top1: float
    block_efficiency: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure(
    student: PreTrainedModel, batches: Iterable[Batch], *, sampled: bool, gammas: Sequence[int] = GAMMAS
) -> Measures:
    """Measure on batches in draft ids. ``sampled``: τ for tokens kept with chance α, else where the argmax agrees."""
    scorer = Scorer(student.eval())
    alphas: list[Tensor] = []
    agreements: list[Tensor] = []
    lengths: list[int] = []
    for whole in batches:
        batch = whole.to(student.device)
        done = 0
        for logits in scorer.pieces(batch.tokens, batch.at):
            ids, logp = batch.ids[done : done + len(logits)], batch.logp[done : done + len(logits)]
            done += len(logits)
            alphas.append(acceptance(pair(logits, Teacher(ids, logp))).cpu())
            agreements.append((logits.argmax(-1) == ids[:, 0]).float().cpu())
        lengths += batch.lengths
    if not lengths:
        raise OptionError("nothing to measure on: no held-out answers")
    alpha, agreement = torch.cat(alphas), torch.cat(agreements)
    along = (alpha if sampled else agreement).split(lengths)
    return Measures(
        len(alpha),
        float(alpha.mean()),
        float(agreement.mean()),
        {gamma: block_efficiency(along, gamma) for gamma in gammas},
    )


def block_efficiency(chances: Sequence[Tensor], gamma: int) -> float:
    """τ: tokens per target call when ``gamma`` are drafted a round.

    chances: a [A] an answer, the chance that the draft's token at each position is kept given all before it.
    With chances 0 and 1 (greedy) this counts the rounds of greedy decoding exactly; with one chance a everywhere it
    tends to (1 − a^{γ+1}) / (1 − a).
    """
    rounds = sum(float(each.sum()) for each in round_begins(chances, gamma))
    return sum(len(each) for each in chances) / rounds


def round_begins(chances: Sequence[Tensor], gamma: int) -> list[Tensor]:
    """The chance that a round of ``gamma`` drafted tokens begins at each position, [A] an answer, for ``chances`` [A].

    A round that begins at i keeps r < γ tokens with chance a_i … a_{i+r−1} (1 − a_{i+r}), all γ with the product of
    γ of them, and the next begins behind the target's own token. So the chance that some round begins at i follows
    from those before i, and their sum is the expected number of rounds.
    """
    longest = max(len(each) for each in chances)
    a = torch.zeros(len(chances), longest + gamma, dtype=torch.float64)
    for row, each in enumerate(chances):
        a[row, : len(each)] = each.double()
    begins = torch.zeros(len(chances), longest + gamma + 1, dtype=torch.float64)
    begins[:, 0] = 1
    for i in range(longest):
        alive = begins[:, i].clone()
        for r in range(gamma):
            begins[:, i + r + 1] += alive * (1 - a[:, i + r])
            alive *= a[:, i + r]
        begins[:, i + gamma + 1] += alive
    return [begins[row, : len(each)] for row, each in enumerate(chances)]
