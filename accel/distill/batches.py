"""Lessons as padded batches, held in memory, epoch after epoch.

Knows lessons and token ids. Does not know texts, losses or optimisers. Every batch is a function of the seed and of its
number, so that a run that was killed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.distill.teacher import Lesson
from accel.errors import OptionError


@dataclass(frozen=True)
class Batch:
    """Lessons side by side. N: the answer tokens of all rows, row after row.

    ``tokens`` int64 [B, T], padded on the right. ``at`` int64 [N]: the flat places (row · T + column) that foretell
    the answer tokens ``answer`` int64 [N]. ``ids`` int64 [N, k], ``logp`` fp32 [N, k]: the teacher's view there.
    """

    tokens: Tensor
    at: Tensor
    answer: Tensor
    ids: Tensor
    logp: Tensor
    # answer tokens of each row
    lengths: tuple[int, ...]
    # whether the target itself wrote the answers
    by_target: bool = False

    def to(self, device: torch.device) -> Batch:
        tensors = ("tokens", "at", "answer", "ids", "logp")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def collate(lessons: Sequence[Lesson], by_target: bool = False) -> Batch:
    """One batch; the last answer token is foretold and not read."""
    read = [torch.cat([each.prompt, each.answer[:-1]]).long() for each in lessons]
    width = max(len(each) for each in read)
    tokens = torch.zeros(len(lessons), width, dtype=torch.long)
    at = []
    for row, (each, lesson) in enumerate(zip(read, lessons, strict=True)):
        tokens[row, : len(each)] = each
        at.append(row * width + torch.arange(len(lesson.prompt) - 1, len(each)))
    return Batch(
        tokens,
        torch.cat(at),
        torch.cat([each.answer for each in lessons]).long(),
        torch.cat([each.ids for each in lessons]).long(),
        torch.cat([each.logp for each in lessons]).float(),
        tuple(len(each.answer) for each in lessons),
        by_target,
    )


class Packing:
    """Which items share a batch: every item once an epoch, rows of like length together, rows · longest ≤ budget."""

    def __init__(self, lengths: Sequence[int], budget: int, seed: int) -> None:
        if not lengths:
            raise OptionError("no lessons to learn from: give more prompts")
        if max(lengths) > budget:
            raise OptionError(f"batch_tokens={budget}: the longest lesson has {max(lengths)} tokens, allow as many")
        self._lengths = lengths
        self._budget = budget
        self._seed = seed
        self._epochs: list[list[list[int]]] = []

    def __getitem__(self, number: int) -> list[int]:
        """The items of batch ``number``, counted over all epochs."""
        epoch = 0
        while number >= len(self.epoch(epoch)):
            number -= len(self.epoch(epoch))
            epoch += 1
        return self.epoch(epoch)[number]

    def epoch(self, number: int) -> list[list[int]]:
        """All batches of one epoch."""
        while number >= len(self._epochs):
            self._epochs.append(self._pack(len(self._epochs)))
        return self._epochs[number]

    def _pack(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        lengths = torch.tensor(self._lengths)
        # a little disorder in the lengths, so that items meet others in each epoch
        order = (lengths * (0.9 + 0.2 * torch.rand(len(lengths), generator=generator))).argsort(stable=True)
        batches: list[list[int]] = [[]]
        longest = 0
        for item in order.tolist():
            longest = max(longest, self._lengths[item])
            if (len(batches[-1]) + 1) * longest > self._budget:
                batches.append([])
                longest = self._lengths[item]
            batches[-1].append(item)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


class Lessons:
    """Lessons that are there already, held in memory, epoch after epoch; ``by_target`` if it wrote the answers."""

    def __init__(self, lessons: Iterable[Lesson], budget: int, seed: int, by_target: bool = False) -> None:
        # shards hold lessons as they were finished, which depends on where a run was killed
        self.lessons = sorted(lessons, key=lambda each: each.index)
        self._by_target = by_target
        self._packing = Packing([len(each.prompt) + len(each.answer) for each in self.lessons], budget, seed)

    def batch(self, number: int) -> Batch:
        return collate([self.lessons[item] for item in self._packing[number]], self._by_target)

    def epoch(self) -> Iterator[Batch]:
        """Every lesson once."""
        for items in self._packing.epoch(0):
            yield collate([self.lessons[item] for item in items], self._by_target)
