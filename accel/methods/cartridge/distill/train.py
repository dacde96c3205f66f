"""The training of cartridges: slots, batches by number, one loss; resumable to the same losses, bit for bit.

Knows lessons as batches. Does not know texts, where lessons come from, or artifacts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.distill.batches import Batch, Lessons
from accel.distill.descent import Descent, alone, update
from accel.distill.forward import Scorer, autocast
from accel.distill.losses import Teacher, forward_kl, pair
from accel.distill.schedule import warm_cosine
from accel.distill.teacher import Lesson
from accel.errors import OptionError
from accel.methods.cartridge.distill.slots import Slots, inputs


@dataclass(frozen=True)
class Training:
    """How slots learn. The model itself never changes."""

    steps: int = 400
    batch_tokens: int = 2048
    learning_rate: float = 0.02
    # shares: of the steps that the rate rises, and of the rate that is left at the end of the cosine
    warmup: float = 0.05
    floor: float = 0.05
    clip: float = 1.0
    # of several documents: share of the steps in which all cartridges stand together, in random order
    together: float = 0.5
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: must be a positive number")
        for name in ("warmup", "floor", "together"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be from 0 to 1")


class Curriculum:
    """Which document a step is about, which of its batches, and who stands in front of it: a function of the step.

    A document is taken as often as its share of the lessons is.
    """

    def __init__(self, lessons: Sequence[Sequence[Lesson]], how: Training) -> None:
        self._sources = [Lessons(each, how.batch_tokens, how.seed + place) for place, each in enumerate(lessons)]
        chance = random.Random(how.seed)
        counts = [0] * len(lessons)
        self._steps: list[tuple[int, int, list[int]]] = []
        for _ in range(how.steps):
            (about,) = chance.choices(range(len(lessons)), weights=[len(each) for each in lessons])
            members = [about]
            if len(lessons) > 1 and chance.random() < how.together:
                members = chance.sample(range(len(lessons)), len(lessons))
            self._steps.append((about, counts[about], members))
            counts[about] += 1

    def __getitem__(self, step: int) -> tuple[Batch, list[int]]:
        """The batch of a step and the cartridges in front of it, by number and in order."""
        about, number, members = self._steps[step]
        return self._sources[about].batch(number), members


def train(
    model: PreTrainedModel,
    slots: Sequence[Slots],
    lessons: Sequence[Sequence[Lesson]],
    how: Training,
    folder: Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train ``slots`` in place on their ``lessons``; one row a step: step, loss, learning_rate, norm, tokens, seconds.

    ``folder`` keeps checkpoints and the log; a run that was killed goes on there, ``made_from`` being what must not
    have changed since.
    """
    module = nn.ModuleList(slots)
    optimizer = torch.optim.Adam(module.parameters(), lr=how.learning_rate, betas=(0.9, 0.95))
    descent = Descent(module, optimizer, folder, asdict(how) | dict(made_from or {}))
    scorer = Scorer(model)
    curriculum = Curriculum(lessons, how)
    with alone(module.parameters(), model):
        return descent.run(how, lambda step: _step(scorer, slots, optimizer, curriculum, how, step), progress)


def loss(scorer: Scorer, members: Sequence[Slots], batch: Batch) -> Tensor:
    """KL(teacher ‖ model behind the cartridges), mean over answer tokens; what a teacher does not list is one event.

    Summed over a token's list and averaged over tokens: averaging over the list too would divide the gradient by its
    length.
    """
    dtype = scorer.model.dtype
    with autocast(batch.tokens.device):
        logits = scorer(batch.tokens, batch.at, **inputs(members, batch.tokens, dtype))
    return forward_kl(pair(logits, Teacher(batch.ids, batch.logp))).mean()


def _step(
    scorer: Scorer,
    slots: Sequence[Slots],
    optimizer: torch.optim.Optimizer,
    curriculum: Curriculum,
    how: Training,
    step: int,
) -> dict[str, Any]:
    rate = how.learning_rate * warm_cosine(step, how.steps, how.warmup, how.floor)
    batch, members = curriculum[step]
    batch = batch.to(scorer.model.device)
    mean = loss(scorer, [slots[place] for place in members], batch)
    weights = (weight for each in slots for weight in each.parameters())
    return update(optimizer, weights, mean, how, rate, step) | {"tokens": len(batch.at)}
