"""Answers that a masked-diffusion model writes itself, by its own rule, and which of them are worth learning.

Knows a denoiser, token ids and lessons on disk. Does not know training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from accel.distill.cache import LessonCache
from accel.distill.checking import is_right
from accel.distill.lessons import complete
from accel.distill.prompts import Encoded
from accel.distill.teacher import Lesson
from accel.errors import OptionError
from accel.methods.dparallel.decoder import DParallelDecoder
from accel.methods.dparallel.options import DParallelOptions
from accel.models.diffusion import Denoiser
from accel.types import Request, Stats

Progress = Callable[[str], None]


def lesson(index: int, prompt: Sequence[int], answer: Sequence[int]) -> Lesson:
    """A lesson without a teacher's view: its tokens alone are learned."""
    nothing = torch.empty(len(answer), 0)
    asked, said = (torch.tensor(each, dtype=torch.int32) for each in (prompt, answer))
    return Lesson(index, asked, said, nothing.int(), nothing.half())


def answers(
    denoiser: Denoiser,
    prompts: Iterable[tuple[int, Sequence[int]]],
    options: DParallelOptions,
    max_new_tokens: int,
    rows: int,
    stats: Stats | None = None,
) -> Iterator[Lesson]:
    """Answer (index, prompt) pairs greedily, ``rows`` at a time; they come as they end, not in order.

    An answer ends with its first end token, which it holds, or is cut. ``stats`` receives forwards and useful tokens:
    those up to an answer's end.
    """
    stats = Stats() if stats is None else stats
    decoder = DParallelDecoder(denoiser, options, stats)
    stop = frozenset(denoiser.facts.stop_tokens)
    waiting = iter(prompts)
    live: dict[int, tuple[Sequence[int], list[int]]] = {}
    while True:
        fresh = list(islice(waiting, rows - len(live)))
        if fresh:
            decoder.admit([_request(index, ids, max_new_tokens, stop, denoiser) for index, ids in fresh])
            live |= {index: (ids, []) for index, ids in fresh}
        if not live:
            return
        for emission in decoder.step():
            prompt, answer = live[emission.request_id]
            answer += emission.tokens
            end = next((place + 1 for place, token in enumerate(answer) if token in stop), None)
            if end is None and len(answer) < max_new_tokens:
                continue
            if end is not None:
                del answer[end:]
            decoder.evict([emission.request_id])
            del live[emission.request_id]
            stats.generated_tokens += len(answer)
            yield lesson(emission.request_id, prompt, answer)


def _request(index: int, ids: Sequence[int], max_new_tokens: int, stop: frozenset[int], denoiser: Denoiser) -> Request:
    prompt = torch.tensor(ids, dtype=torch.long, device=denoiser.device)
    return Request(index, prompt, max_new_tokens, prompt, stop_tokens=stop)


def text_of(tokenizer: Any, answer: Lesson) -> str:
    """What an answer says, without special tokens."""
    text: str = tokenizer.decode(answer.answer.tolist(), skip_special_tokens=True)
    return text


@dataclass(frozen=True)
class Kept:
    """Answers to learn from, and what became of the others."""

    lessons: list[Lesson]
    written: int
    cut: int
    wrong: int

    def as_dict(self) -> dict[str, int]:
        return {"written": self.written, "kept": len(self.lessons), "cut": self.cut, "wrong": self.wrong}


def keep(lessons: Iterable[Lesson], stop: Collection[int], tokenizer: Any, known: Sequence[str | None] | None) -> Kept:
    """Those that end, and where ``known`` answers are given (by index) come to the same.

    An answer without an end teaches to go on for ever.
    """
    kept: list[Lesson] = []
    written = cut = wrong = 0
    for each in lessons:
        written += 1
        if not len(each.answer) or int(each.answer[-1]) not in stop:
            cut += 1
        elif known is not None and not is_right(text_of(tokenizer, each), known[each.index] or ""):
            wrong += 1
        else:
            kept.append(each)
    return Kept(kept, written, cut, wrong)


def self_written(
    denoiser: Denoiser,
    asked: Encoded,
    options: DParallelOptions,
    max_new_tokens: int,
    rows: int,
    folder: Path,
    base: Mapping[str, Any],
    max_bytes: int,
    progress: Progress = lambda message: None,
) -> list[Lesson]:
    """The model's own answers to all prompts, as many as ``max_bytes`` has room for; a killed run goes on here.

    ``base``: what the answers depend on beside the options; a folder made with another is refused.
    """
    description = {
        **base,
        "source": "itself",
        "facts": denoiser.facts.as_dict(),
        "options": asdict(options),
        "prompts": asked.digest(),
        "max_new_tokens": max_new_tokens,
    }
    cache = LessonCache.open(folder, description, max_bytes)

    def make(left: list[int]) -> Iterator[Lesson]:
        return answers(denoiser, ((index, asked.prompts[index]) for index in left), options, max_new_tokens, rows)

    return complete(cache, len(asked.prompts), make, progress)


def from_file(asked: Encoded) -> list[Lesson]:
    """The file's own answers; OptionError where a prompt has none."""
    without = sum(answer is None for answer in asked.answers)
    if without:
        raise OptionError(
            f"{without} of {len(asked.prompts)} prompts have no answer in the file: add them, or let the model write "
            "them (data='self')"
        )
    pairs = zip(asked.prompts, asked.answers, strict=True)
    return [lesson(index, prompt, answer or []) for index, (prompt, answer) in enumerate(pairs)]
