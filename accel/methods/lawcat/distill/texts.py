"""Documents as rows of one length: files to token ids, which of them are held out, and packing.

Knows texts and tokenizers. Does not know models. Documents stand one behind the other in a row, each with the end
token behind it where there is one, and a row may begin in the middle of one: teacher and student read the same.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.distill.batches import Packing
from accel.distill.prompts import encode, read, split
from accel.errors import OptionError


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, and a digest of each that decides on which side it is."""

    ids: list[list[int]]
    digests: list[str]

    def take(self, places: Sequence[int]) -> list[list[int]]:
        return [self.ids[place] for place in places]


@dataclass(frozen=True, eq=False)
class Rows:
    """What is learned, int64 [N, length], and what is only measured with: rows of at most as many tokens."""

    learned: Tensor
    held_out: list[Tensor]

    @property
    def digest(self) -> str:
        """sha256 of all that is learned."""
        return hashlib.sha256(json.dumps([list(self.learned.shape), self.learned.tolist()]).encode()).hexdigest()

    def batches(self, tokens: int, seed: int) -> Batches:
        """``tokens`` of them a batch, epoch after epoch."""
        return Batches(self.learned, tokens, seed)


class Batches:
    """Rows by the number of a batch: a function of the seed."""

    def __init__(self, rows: Tensor, tokens: int, seed: int) -> None:
        self._rows = rows
        self._packing = Packing([rows.shape[1]] * len(rows), tokens, seed)

    def __getitem__(self, number: int) -> Tensor:
        return self._rows[self._packing[number]]


def documents(prompts: Sequence[Path], corpora: Sequence[Path], tokenizer: Any, length: int) -> Documents:
    """Of JSON lines (each line with its answer) and of text files, whose stretches of ``length`` tokens are documents
    of their own, so that some of a single file can be held out."""
    if not prompts and not corpora:
        raise OptionError("nothing to learn from: give --prompts (JSON lines) or --corpus (text files), or both")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[list[int]] = []
    if prompts:
        found = encode(read(prompts), tokenizer, longest=sys.maxsize)
        for asked, answer in zip(found.prompts, found.answers, strict=True):
            ids.append([*asked, *(answer or []), *end])
    for path in corpora:
        whole = [*tokenizer(_text(path))["input_ids"], *end]
        ids += [whole[start : start + length] for start in range(0, len(whole), length)]
    return Documents(ids, [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in ids])


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the corpus {path}: {error}") from error
    if not text.strip():
        raise OptionError(f"{path}: the corpus is empty")
    return text


def rows(given: Documents, length: int, share: float, most: int, seed: int) -> Rows:
    """Documents in random order as rows; about ``share`` of them, at most ``most``, are held out."""
    kept, held = split(given.digests, share, most)
    order = random.Random(seed).sample(kept, len(kept))
    learned = [each for each in _packed(given.take(order), length) if len(each) == length]
    if not learned:
        total = sum(map(len, given.take(kept)))
        raise OptionError(
            f"length={length}: {total} tokens to learn from make no row of it; give more, or shorter rows"
        )
    # one token alone foretells nothing
    return Rows(torch.stack(learned), [each for each in _packed(given.take(held), length) if len(each) > 1])


def _packed(texts: Sequence[Sequence[int]], length: int) -> Iterator[Tensor]:
    """Rows of ``length``, and what is left over at the end."""
    stream = torch.tensor([token for text in texts for token in text])
    yield from stream.split(length)
