"""Documents as rows of one length: files to token ids, which of them are held out, and packing.

Knows texts and tokenizers. Does not know models. Documents stand one behind the other in a row, each with the end
token behind it where there is one; a longer one is several. A row begins where a document does, so that what an answer
needs stands in front of it. Where the next one does not fit, its beginning fills the row, and the next row begins with
it again.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.distill.batches import Packing
from accel.distill.files import read_document
from accel.distill.prompts import encode, read, split
from accel.errors import OptionError


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, none longer than a row, and a digest of each that decides on which side it is."""

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
    """Of JSON lines (each line with its answer) and of text files; stretches of ``length`` tokens are documents, so
    that some of a single file can be held out."""
    if not prompts and not corpora:
        raise OptionError("nothing to learn from: give --prompts (JSON lines) or --corpus (text files), or both")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole: list[list[int]] = []
    if prompts:
        found = encode(read(prompts), tokenizer, longest=sys.maxsize)
        whole += [[*asked, *(answer or [])] for asked, answer in zip(found.prompts, found.answers, strict=True)]
    # a whole book is longer than any model's context, and is not read in one piece
    whole += [tokenizer(read_document(path, "the corpus"), verbose=False)["input_ids"] for path in corpora]
    cut = [[*each, *end][at : at + length] for each in whole for at in range(0, len(each) + len(end), length)]
    return Documents(cut, [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in cut])


def rows(given: Documents, length: int, share: float, most: int, seed: int) -> Rows:
    """Documents in random order as rows; about ``share`` of them, at most ``most``, are held out."""
    kept, held = split(given.digests, share, most)
    order = random.Random(seed).sample(kept, len(kept))
    texts, unseen = given.take(order), given.take(held)
    if (total := sum(map(len, texts))) < length:
        raise OptionError(
            f"length={length}: {total} tokens to learn from make no row of it; give more, or shorter rows"
        )
    # one token alone foretells nothing
    short = [torch.tensor(row) for row in _packed(unseen, length) if len(row) > 1]
    return Rows(torch.tensor(list(_packed(texts, length, fill=True))), short)


def _packed(texts: Sequence[list[int]], length: int, *, fill: bool = False) -> Iterator[list[int]]:
    """Whole texts side by side, at most ``length`` tokens; or exactly as many, what follows filling up."""
    row: list[int] = []
    for text in texts:
        if len(row) + len(text) > length:
            yield row + text[: length - len(row)] if fill else row
            row = []
        row = row + text
    if row:
        # behind the last one the first ones follow
        yield list(islice(chain(row, *texts), length)) if fill else row
