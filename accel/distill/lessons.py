"""Lessons that can be kept: answers of the target or of the file, with the target's view, made once and cached.

Knows prompts as token ids and folders. Does not know students or training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from accel.distill.cache import LessonCache, bytes_per_token
from accel.distill.forward import Scorer
from accel.distill.prompts import Encoded
from accel.distill.teacher import Generation, Lesson, answers, judge_all
from accel.models import cpu_linear
from accel.models.lean import target_for

# lessons of one file: what a killed run loses at most
SHARD = 64
# answers of the file that are read together
_JUDGED = 8
# the header of a shard and its line in the index
_PER_SHARD = 2048
# three int64
_PER_LESSON = 24
# in a folder that could take no more: the limit that ended it
_FULL = "full"

Progress = Callable[[str], None]


def predicted_bytes(prompt_lengths: Sequence[int], answer_tokens: int, k: int) -> int:
    """The most that lessons take on disk, with answers of ``answer_tokens`` each."""
    lessons = sum(_PER_LESSON + 4 * length + answer_tokens * bytes_per_token(k) for length in prompt_lengths)
    return lessons + _PER_SHARD * -(-len(prompt_lengths) // SHARD)


def fill(cache: LessonCache, lessons: Iterable[Lesson], total: int, progress: Progress = lambda message: None) -> None:
    """Put lessons into the cache, shard by shard, until there are no more or ``max_bytes`` is reached."""
    waiting: list[Lesson] = []
    for lesson in lessons:
        waiting.append(lesson)
        if len(waiting) == SHARD:
            if not _append(cache, waiting):
                return
            waiting = []
        progress(f"{cache.num_lessons + len(waiting)} of {total} answers · {cache.nbytes / 2**20:.0f} MiB")
    if waiting:
        _append(cache, waiting)


def complete(
    cache: LessonCache,
    total: int,
    make: Callable[[list[int]], Iterable[Lesson]],
    progress: Progress = lambda message: None,
) -> list[Lesson]:
    """The lessons 0 … total - 1, after ``make(missing indices)`` made what the cache lacks; fewer where it is full."""
    done = cache.indices()
    left = [index for index in range(total) if index not in done]
    if left and not is_full(cache):
        fill(cache, make(left), total, progress)
    if cache.num_lessons < total:
        progress(f"full after {cache.num_lessons} of {total} answers")
    return list(cache)


def is_full(cache: LessonCache) -> bool:
    """Whether this limit, or a higher one, ended it before."""
    mark = cache.folder / _FULL
    return mark.exists() and int(mark.read_text()) >= cache.max_bytes


def _append(cache: LessonCache, lessons: Sequence[Lesson]) -> bool:
    """Add a shard, or the half, quarter, … of it that there is room for; False, and a mark, where it was less."""
    if cache.append(lessons):
        return True
    part = lessons[: len(lessons) // 2]
    while part and not cache.append(part):
        part = part[: len(part) // 2]
    # a run that goes on must not find room for a lesson that this one had none for: its batches would be others
    (cache.folder / _FULL).write_text(f"{cache.max_bytes}\n")
    return False


@dataclass(frozen=True)
class Library:
    """The cached lessons of one run under ``work``; ``shares`` are the bytes that each folder may take."""

    model: PreTrainedModel
    work: Path
    shares: Mapping[str, int]
    base: Mapping[str, Any]
    progress: Progress

    def written(self, folder: str, asked: Encoded, how: Generation) -> list[Lesson]:
        """Answers by the target itself."""
        facts = {
            "source": "target",
            "temperature": how.temperature,
            "seed": how.seed,
            "stop_tokens": sorted(how.stop_tokens),
        }

        def make(left: list[int]) -> Iterator[Lesson]:
            target = target_for(self.model)
            # answers are written step by step, as they are when the model is asked
            installed = cpu_linear.install(target.linears)
            try:
                yield from answers(target, ((i, asked.prompts[i]) for i in left), how)
            finally:
                installed.remove()

        return self._made(folder, asked, how, facts, make)

    def judged(self, folder: str, asked: Encoded, how: Generation) -> list[Lesson]:
        """Answers of the file, cut to the length limit, as the target sees them."""
        return self._made(folder, asked, how, {"source": "fixed"}, lambda left: self._judge(asked, left, how))

    def _judge(self, asked: Encoded, left: list[int], how: Generation) -> Iterator[Lesson]:
        score = Scorer(self.model)
        for start in range(0, len(left), _JUDGED):
            some = left[start : start + _JUDGED]
            given = [(i, asked.prompts[i], (asked.answers[i] or [])[: how.max_new_tokens]) for i in some]
            yield from judge_all(score, given, how.k)

    def _made(
        self,
        folder: str,
        asked: Encoded,
        how: Generation,
        facts: Mapping[str, Any],
        make: Callable[[list[int]], Iterable[Lesson]],
    ) -> list[Lesson]:
        """What the folder holds, after making what it lacks."""
        description = {
            **self.base,
            **facts,
            "prompts": asked.digest(),
            "k": how.k,
            "max_new_tokens": how.max_new_tokens,
        }
        cache = LessonCache.open(self.work / folder, description, self.shares[folder])
        return complete(cache, len(asked.prompts), make, lambda message: self.progress(f"{folder}: {message}"))
