"""The training loop: a student, batches by number, a loss; resumable to the same losses, bit for bit.

Knows ids of the draft's vocabulary alone. Does not know texts, where batches come from, or artifacts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from accel.distill.batches import Batch
from accel.distill.descent import Descent, update
from accel.distill.forward import Scorer, autocast
from accel.distill.losses import LOSSES, Teacher, acceptance, pair, select, unlisted
from accel.distill.losses import loss as divergence
from accel.distill.schedule import warm_cosine
from accel.errors import OptionError, unknown_name


@dataclass(frozen=True)
class Training:
    """How a student learns."""

    steps: int = 1000
    loss: str = "lk"
    # of the losses that have one: where jsd stands between its two ends
    beta: float = 0.5
    # what the next-token loss of texts that are said twice counts beside it
    copying: float = 0.0
    # next-token loss on the same answers: what an undistilled draft would be
    baseline: bool = False
    # share of the answer tokens that are learned from, chosen with a reference draft; 1 is all of them
    keep: float = 1.0
    learning_rate: float = 1e-3
    # shares: of the steps that the rate rises, and of the rate that is left at the end of the cosine
    warmup: float = 0.05
    floor: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise OptionError(unknown_name("loss", self.loss, LOSSES))
        for name in ("steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "clip", "keep"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: must be a positive number")
        if not 0 <= self.copying < math.inf:
            raise OptionError(f"copying={self.copying}: must be 0 (nothing to copy) or a positive number")
        for name in ("beta", "keep", "warmup", "floor", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        if self.baseline and self.keep < 1:
            raise OptionError("baseline with keep < 1: tokens are chosen by what the target says, which it leaves out")

    def rate(self, step: int) -> float:
        """The learning rate of a step: up linearly, then down along a cosine."""
        return self.learning_rate * warm_cosine(step, self.steps, self.warmup, self.floor)


def train(
    student: PreTrainedModel,
    batches: Callable[[int], Batch],
    how: Training,
    folder: Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    reference: PreTrainedModel | None = None,
    copies: Callable[[int], Batch] | None = None,
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train ``student`` in place; one row a step: step, loss, acceptance, learning_rate, norm, tokens, seconds.

    ``batches(step)`` gives a batch in draft ids (-1: a token that the draft cannot say). ``folder`` keeps checkpoints
    and the log; a run that was killed goes on there, ``made_from`` being what must not have changed since.
    ``reference``: a draft for the choice of tokens, needed where ``keep`` < 1. ``copies(step)``: a batch whose answers
    are to be copied, needed where ``copying`` > 0; its next-token loss counts that much beside the other.
    """
    if how.keep < 1 and reference is None:
        raise OptionError(f"keep={how.keep}: choosing tokens needs a reference draft")
    if how.copying > 0 and copies is None:
        raise OptionError(f"copying={how.copying}: needs batches to copy from")
    optimizer = torch.optim.AdamW(
        _groups(student, how.weight_decay), lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=how.weight_decay
    )
    descent = Descent(student, optimizer, folder, asdict(how) | dict(made_from or {}))
    scorer = Scorer(student)
    judge = None if reference is None else Scorer(reference.eval())
    student.train()
    try:
        return descent.run(
            how,
            lambda step: _step(
                scorer,
                judge,
                optimizer,
                batches(step).to(student.device),
                None if copies is None or how.copying == 0 else copies(step).to(student.device),
                how,
                step,
            ),
            progress,
        )
    finally:
        student.eval()


def _step(
    scorer: Scorer,
    judge: Scorer | None,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    copied: Batch | None,
    how: Training,
    step: int,
) -> dict[str, Any]:
    teacher = Teacher(batch.ids, batch.logp)
    device = batch.tokens.device
    # dropout's randomness belongs to the step, not to how many steps this process took
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(how.seed * 1_000_003 + step)
        with autocast(device):
            logits = scorer(batch.tokens, batch.at)
    pairing = pair(logits, teacher)
    if how.baseline:
        losses, kept = next_token(logits, batch.answer)
    else:
        losses = divergence(how.loss, pairing, beta=how.beta)
        kept = torch.ones_like(losses, dtype=torch.bool)
        if judge is not None and how.keep < 1:
            with torch.no_grad(), autocast(device):
                easier = divergence(how.loss, pair(judge(batch.tokens, batch.at), teacher), beta=how.beta)
            kept = select(losses.detach(), easier, how.keep)
        if batch.by_target:
            losses = losses + unlisted(logits, teacher, batch.answer)
    mean = losses[kept].sum() / kept.sum().clamp(min=1)
    with torch.no_grad():
        told: dict[str, Any] = {"acceptance": float(acceptance(pairing).mean()), "tokens": int(kept.sum())}
    summands = _with_copies(mean, scorer, copied, how, step, told)
    row = update(optimizer, scorer.model.parameters(), summands, how, how.rate(step), step)
    return row | told


def _with_copies(
    mean: Tensor, scorer: Scorer, copied: Batch | None, how: Training, step: int, told: dict[str, Any]
) -> Iterator[Tensor]:
    """The loss of a step and, where it has some, that of its copies; what was copied rightly is put into ``told``."""
    yield mean
    if copied is None:
        return
    device = copied.tokens.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(how.seed * 1_000_003 + step)
        with autocast(device):
            logits = scorer(copied.tokens, copied.at)
    losses, kept = next_token(logits, copied.answer)
    told["copied"] = float((logits.argmax(-1) == copied.answer)[kept].float().mean())
    yield how.copying * losses[kept].sum() / kept.sum().clamp(min=1)


def next_token(logits: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy [N] with the token that was written, and where it counts [N]: not where the draft cannot say it.

    logits [N, V], answer int64 [N], -1 where the draft's vocabulary lacks the token
    """
    return F.cross_entropy(logits, answer, ignore_index=-1, reduction="none"), answer >= 0


def _groups(student: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
