"""Where batches for a draft come from: lessons that are there, the student of the moment, or a changing mix of both.

Knows lessons, token ids and draft vocabularies. Does not know texts, losses or optimisers. Every batch is a function of
the seed and of its number, so that a run that was killed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.distill.batches import Batch, Packing, collate
from accel.distill.forward import Scorer
from accel.distill.teacher import Generation, answers, judge_all
from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError, unknown_name
from accel.models.softmax_target import SoftmaxTarget

SOURCES = ("draft", "fixed", "target")


class Translation:
    """A batch in the draft's ids: what it reads becomes ``unknown`` where it has no id, what it should say -1."""

    def __init__(self, vocabulary: VocabularyMap | None) -> None:
        self.vocabulary = vocabulary
        if vocabulary is not None:
            self._read = vocabulary.t2d()
            self._say = torch.full((vocabulary.target_vocab_size,), -1)
            self._say[vocabulary.d2t] = torch.arange(len(vocabulary.d2t))

    def __call__(self, batch: Batch) -> Batch:
        if self.vocabulary is None:
            return batch
        say = self._say
        return replace(batch, tokens=self._read[batch.tokens], answer=say[batch.answer], ids=say[batch.ids])

    def read(self, tokens: Sequence[int]) -> list[int]:
        """Target ids → draft ids, as the drafter reads them."""
        if self.vocabulary is None:
            return list(tokens)
        return [int(each) for each in self._read[torch.tensor(tokens)]]

    def to_target(self, tokens: Tensor) -> list[int]:
        """Draft ids → target ids."""
        table = None if self.vocabulary is None else self.vocabulary.d2t
        return [int(each) for each in (tokens if table is None else table[tokens.long()])]

    def say(self, tokens: Iterable[int]) -> list[int]:
        """The draft ids of those target ids that have one."""
        if self.vocabulary is None:
            return list(tokens)
        return [found for token in tokens if (found := int(self._say[token])) >= 0]


class Source(Protocol):
    """Batches by number, in the target's ids."""

    def batch(self, number: int) -> Batch: ...


class OnPolicy:
    """Answers written by the student as it is when asked, judged by the target (Agarwal et al. 2024, arXiv 2306.13649).

    Not cached: the student that wrote them is gone a step later.
    """

    def __init__(
        self,
        target: Scorer,
        student: PreTrainedModel,
        translation: Translation,
        prompts: Sequence[Sequence[int]],
        how: Generation,
        budget: int,
    ) -> None:
        self._target = target
        self._student = student
        self._translation = translation
        self._prompts = prompts
        stop = translation.say(how.stop_tokens)
        self._how = replace(how, stop_tokens=stop)
        self._k = how.k
        self._packing = Packing([len(each) + how.max_new_tokens for each in prompts], budget, how.seed)

    def batch(self, number: int) -> Batch:
        items = self._packing[number]
        asked = [(item, self._translation.read(self._prompts[item])) for item in items]
        how = replace(self._how, seed=(self._how.seed * 7919 + number) % 2**40, k=1, rows=len(items))
        training = self._student.training
        self._student.eval()
        try:
            written = list(answers(SoftmaxTarget(self._student), asked, how))
        finally:
            self._student.train(training)
        written.sort(key=lambda each: each.index)
        said = [(each.index, self._prompts[each.index], self._translation.to_target(each.answer)) for each in written]
        return collate(judge_all(self._target, said, self._k))


@dataclass(frozen=True)
class Mix:
    """Shares of the sources at the first and at the last step; between them the shares change linearly.

    A source that writes may name its temperature, as in ``target@0``.
    """

    first: tuple[tuple[str, float], ...]
    last: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """``target``, ``target:0.5,draft:0.5``, ``target@0,target@1``, or a change over training, ``target>draft``."""
        sides = text.split(">")
        if len(sides) > 2:
            raise OptionError(f"data={text!r}: at most one '>', as in target>draft")
        return cls(_shares(sides[0], text), _shares(sides[-1], text))

    @property
    def sources(self) -> list[str]:
        """The sources that have a share at some time."""
        return sorted({name for name, share in (*self.first, *self.last) if share > 0})

    def schedule(self, steps: int, seed: int) -> list[str]:
        """The source of each step, drawn by its share at that step."""
        draws = torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        first, last = dict(self.first), dict(self.last)
        chosen = []
        for step, draw in enumerate(draws):
            late = step / max(steps - 1, 1)
            shares = [(1 - late) * first.get(name, 0.0) + late * last.get(name, 0.0) for name in self.sources]
            place, total = 0, shares[0]
            while draw >= total and place < len(shares) - 1:
                place += 1
                total += shares[place]
            chosen.append(self.sources[place])
        return chosen


def writer(source: str) -> tuple[str, float | None]:
    """``target@0`` → who writes (one of ``SOURCES``) and at which temperature, None where it names none."""
    name, at, number = source.partition("@")
    if name not in SOURCES:
        raise OptionError(unknown_name("data source", name, SOURCES))
    if not at:
        return name, None
    try:
        temperature = float(number)
    except ValueError:
        temperature = -1.0
    if name == "fixed" or not 0 <= temperature < float("inf"):
        raise OptionError(
            f"data source {source!r}: only target and draft write, at a temperature ≥ 0, as in target@0 (greedy)"
        )
    return name, temperature


def _shares(text: str, whole: str) -> tuple[tuple[str, float], ...]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        writer(name)
        try:
            share = float(number) if colon else 1.0
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf") or name in shares:
            raise OptionError(f"data={whole!r}: write each source once, with a share ≥ 0, as in target:0.5,draft:0.5")
        shares[name] = share
    total = sum(shares.values())
    if total == 0:
        raise OptionError(f"data={whole!r}: all shares are 0, one must be more")
    return tuple((name, share / total) for name, share in sorted(shares.items()))


class Mixture:
    """The batch of every step of training, each from one source."""

    def __init__(self, sources: Mapping[str, Source], mix: Mix, steps: int, seed: int) -> None:
        self._sources = sources
        self._plan: list[tuple[str, int]] = []
        used = dict.fromkeys(sources, 0)
        for name in mix.schedule(steps, seed):
            self._plan.append((name, used[name]))
            used[name] += 1

    def batch(self, step: int) -> Batch:
        name, number = self._plan[step]
        return self._sources[name].batch(number)
