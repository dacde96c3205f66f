"""An embedder without a model, and demonstrations that differ in known ways."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.methods.cascade.answerer import Reply, Sample, Sampling
from accel.methods.cascade.prices import Usage
from accel.methods.cascade.store import Demonstration, Step


class WordEmbedder:
    """Sums of one random vector a word: texts that share words are similar, others are not. Counts what it is asked."""

    name = "words"

    def __init__(self, size: int = 64, digest: str = "d0") -> None:
        self.size, self.digest = size, digest
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.stack([sum(map(self._word, text.split()), torch.zeros(self.size)) for text in texts])

    def _word(self, word: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(word.lower().encode()))
        return torch.randn(self.size, generator=generator)


def demonstration(goal: str, *actions: str, **changes: object) -> Demonstration:
    """Each step sees "see ACTION" and thinks "because ACTION"."""
    steps = tuple(Step(f"see {action}", action, f"because {action}") for action in actions or ("go",))
    return Demonstration(goal, steps, **changes)  # type: ignore[arg-type]


class Scripted:
    """An answerer that says what it is told to, each question's texts in turn. Records what it was asked.

    A script's entry is a text, an exception to raise, or a function of the question. Each sample reads ``prompt``
    tokens (once a question where samples share it) and writes ``written``.
    """

    def __init__(self, name, *script, price=None, prompt=100, written=10, shares_prompt=True):
        self.name, self.price, self.shares_prompt = name, price, shares_prompt
        self.script, self.prompt, self.written = list(script), prompt, written
        self.questions: list[tuple[list[dict[str, str]], int, Sampling, float]] = []

    def sample(self, messages, n, settings, *, seconds):
        self.questions.append(([dict(each) for each in messages], n, settings, seconds))
        texts = []
        for _ in range(n):
            said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            if isinstance(said, Exception):
                raise said
            texts.append(said(messages) if callable(said) else said)
        usage = Usage(self.prompt * (1 if self.shares_prompt else n), 0, self.written * n)
        return Reply(tuple(map(Sample, texts)), usage, 2.0, f"{self.name}-served")
