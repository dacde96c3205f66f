"""The training of masked-diffusion models: answers as canvases, views of them, one loss; resumable bit for bit.

Knows lessons, a denoiser and the parameters that learn. Does not know texts, where lessons come from, or artifacts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.distill.batches import Packing
from accel.distill.descent import Descent, alone, update
from accel.distill.forward import autocast
from accel.distill.schedule import warm_cosine
from accel.distill.teacher import Lesson
from accel.errors import ModelError, OptionError, unknown_name
from accel.methods.dparallel.distill import masks
from accel.methods.dparallel.distill.losses import Parts, certainty_forcing
from accel.methods.dparallel.distill.masks import Noise
from accel.models.diffusion import Denoiser, DiffusionFacts

# how long a canvas is: as long as decoding makes it, or any whole number of blocks that the answer fits in
CANVASES = ("whole", "random")
# rows of the noise that nothing is learned from
_HELD = 2**20


@dataclass(frozen=True)
class Training:
    """How a model learns to fill masks."""

    steps: int = 1000
    # tokens of a batch with padding, all views
    batch_tokens: int = 4096
    learning_rate: float = 2e-5
    # shares: of the steps that the rate rises, and of the rate that is left at the end of the cosine
    warmup: float = 0.05
    floor: float = 0.1
    clip: float = 1.0
    noise: str = "blocks"
    # of a block or an answer: how much of it the first of two views hides
    share: float = 0.5
    # the shortest time of "diffusion", "maskgit" and "block"
    eps: float = 1e-3
    beta: float = 2.0
    entropy_temperature: float = 0.5
    # positions of an answer with its padding, rounded up to blocks
    max_new_tokens: int = 256
    canvas: str = "whole"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "max_new_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "clip", "entropy_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: must be a positive number")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        for name in ("share", "eps"):
            if not 0 < getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if not 0 <= self.beta < math.inf:
            raise OptionError(f"beta={self.beta}: must be 0 (cross entropy alone) or more")
        masks.check(self.noise)
        if self.canvas not in CANVASES:
            raise OptionError(unknown_name("canvas", self.canvas, CANVASES))

    @property
    def views(self) -> int:
        """Rows that one lesson becomes, at most."""
        return 2 if self.noise in ("blocks", "response") else 1

    def positions(self, block_length: int) -> int:
        """Positions of a whole canvas."""
        return -(-self.max_new_tokens // block_length) * block_length


@dataclass(frozen=True, eq=False)
class Views:
    """Rows with masks in them. N: the learned tokens of all rows, row after row.

    ``rows`` int64 [T_r] each; ``at`` int64 [L_r] each, the positions that are learned; ``labels`` int64 [N],
    ``weight`` fp32 [N]; ``tokens``: how many tokens the weighted sum of their losses stands for.
    """

    rows: list[Tensor]
    at: list[Tensor]
    labels: Tensor
    weight: Tensor
    tokens: int


def filler(facts: DiffusionFacts) -> int:
    """What stands behind an answer's end: the end again, as LLaDA and Dream were trained."""
    if facts.pad_token in facts.stop_tokens:
        assert facts.pad_token is not None
        return facts.pad_token
    if not facts.stop_tokens:
        raise ModelError(
            "stop_tokens: the model's facts name none, and an answer needs an end: name them in its config"
        )
    return facts.stop_tokens[0]


class Canvases:
    """Lessons as canvases with masks: a function of the step."""

    def __init__(self, lessons: Iterable[Lesson], how: Training, facts: DiffusionFacts) -> None:
        # shards hold lessons as they were finished, which depends on where a run was killed
        self.lessons = sorted(lessons, key=lambda each: each.index)
        self.how, self.facts = how, facts
        self._filler = filler(facts)
        self._whole = how.positions(facts.block_length)
        lengths = [how.views * (len(each.prompt) + self._whole) for each in self.lessons]
        self._packing = Packing(lengths, how.batch_tokens, how.seed)

    def __getitem__(self, step: int) -> Views:
        """What a step learns from."""
        items = [self.lessons[item] for item in self._packing[step]]
        return self.views(items, step)

    def held(self, size: int = 8) -> Iterable[Views]:
        """Every lesson once, under masks that no step sees; ``size`` lessons at a time."""
        for start in range(0, len(self.lessons), size):
            yield self.views(self.lessons[start : start + size], _HELD + start)

    def views(self, items: Sequence[Lesson], step: int) -> Views:
        """Some lessons under the masks of one step."""
        found = Views([], [], torch.empty(0, dtype=torch.long), torch.empty(0), 0)
        labels, weights, tokens = [], [], 0
        clock = masks.times(len(items), self.how.eps, self.how.seed, step)
        for lesson, now in zip(items, clock, strict=True):
            chance = masks.generator(self.how.seed, step, lesson.index)
            canvas = self._canvas(lesson, chance)
            noise = self._noise(min(len(lesson.answer), len(canvas)), len(canvas), now, chance)
            tokens += noise.tokens
            for hidden, learned in zip(noise.hidden, noise.learned, strict=True):
                places = learned.nonzero()[:, 0]
                shown = canvas.masked_fill(hidden, self.facts.mask_token)
                found.rows.append(torch.cat([lesson.prompt.long(), shown]))
                found.at.append(len(lesson.prompt) + places)
                labels.append(canvas[places])
                weights.append(torch.full((len(places),), noise.weight))
        return Views(found.rows, found.at, torch.cat(labels), torch.cat(weights), tokens)

    def _canvas(self, lesson: Lesson, chance: torch.Generator) -> Tensor:
        """The answer and what stands behind it, int64 [whole blocks]; a longer answer is cut."""
        length = self._whole
        if self.how.canvas == "random":
            size = self.facts.block_length
            least = min(-(-len(lesson.answer) // size), self._whole // size)
            length = size * int(torch.randint(least, self._whole // size + 1, (), generator=chance))
        canvas = torch.full((length,), self._filler)
        answer = lesson.answer.long()[:length]
        canvas[: len(answer)] = answer
        return canvas

    def _noise(self, length: int, canvas: int, now: float, chance: torch.Generator) -> Noise:
        if self.how.noise == "diffusion":
            return masks.diffusion(canvas, now, chance)
        if self.how.noise == "maskgit":
            return masks.maskgit(canvas, now, chance)
        if self.how.noise == "response":
            return masks.response(canvas, chance, self.how.share)
        if self.how.noise == "block":
            return masks.block(length, canvas, self.facts.block_length, now, chance)
        return masks.blocks(length, canvas, self.facts.block_length, chance, self.how.share)


def loss(denoiser: Denoiser, views: Views, how: Training) -> Parts:
    """The loss of some views, with a gradient where gradients are on."""
    with autocast(denoiser.device):
        logits = torch.cat(denoiser.differentiable(views.rows, views.at))
    device = logits.device
    return certainty_forcing(
        logits,
        views.labels.to(device),
        views.weight.to(device),
        views.tokens,
        mask_token=denoiser.facts.mask_token,
        beta=how.beta,
        temperature=how.entropy_temperature,
    )


def train(
    denoiser: Denoiser,
    learner: nn.Module,
    lessons: Sequence[Lesson],
    how: Training,
    folder: Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train the parameters of ``learner`` in place, those of the denoiser's model or additions to it, and no others.

    One row a step: step, loss, cross_entropy, entropy, correct, learning_rate, norm, tokens, seconds. ``folder`` keeps
    checkpoints and the log; a run that was killed goes on there, ``made_from`` being what must not have changed since.
    """
    weights = list(learner.parameters())
    optimizer = torch.optim.AdamW(weights, lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    canvases = Canvases(lessons, how, denoiser.facts)
    descent = Descent(learner, optimizer, folder, asdict(how) | dict(made_from or {}))
    with alone(weights, denoiser.model):
        return descent.run(how, lambda step: _step(denoiser, weights, optimizer, canvases[step], how, step), progress)


def _step(
    denoiser: Denoiser,
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    views: Views,
    how: Training,
    step: int,
) -> dict[str, Any]:
    rate = how.learning_rate * warm_cosine(step, how.steps, how.warmup, how.floor)
    parts = loss(denoiser, views, how)
    told = {"cross_entropy": parts.cross_entropy, "entropy": parts.entropy, "correct": parts.correct}
    return update(optimizer, weights, parts.loss, how, rate, step) | told | {"tokens": len(views.labels)}


@torch.no_grad()
def measure(denoiser: Denoiser, lessons: Sequence[Lesson], how: Training) -> dict[str, float]:
    """Cross entropy, entropy of what is right (both in nats, the entropy at its training temperature) and the share of
    right tokens, over hidden tokens of lessons that nothing was learned from."""
    sums, count = [0.0, 0.0, 0.0], 0
    right = 0.0
    for views in Canvases(lessons, how, denoiser.facts).held():
        parts, size = loss(denoiser, views, how), len(views.labels)
        sums[0] += parts.cross_entropy * size
        sums[1] += parts.entropy * parts.correct * size
        right += parts.correct * size
        count += size
    if not count:
        return {}
    return {
        "cross_entropy": round(sums[0] / count, 5),
        "entropy_of_correct": round(sums[1] / max(right, 1e-9), 5),
        "correct": round(right / count, 5),
    }
